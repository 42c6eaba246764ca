"""Figures hold what they should, without a window, a warning or two texts on one spot."""

import builtins
import pickle
import warnings

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.style")
from lightning_influence import plotting
from lightning_influence.plotting import Item
from lightning_influence.report import Opinion
from lightning_influence.scores import Scores, SelfScores


def titles(axes):
    return [cell.get_title() for cell in axes]


def overlapping(figure):
    """Pairs of texts in the drawn figure that share more than a rounding of ink."""
    renderer = figure.canvas.get_renderer()
    texts = [
        t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text() and not t.get_clip_on()
    ]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    return [
        (one, other)
        for i, (one, a) in enumerate(boxes)
        for other, b in boxes[i + 1 :]
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


def outside(figure):
    """Texts that reach over the figure's edge."""
    renderer = figure.canvas.get_renderer()
    texts = [
        t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text() and not t.get_clip_on()
    ]
    whole = figure.bbox
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    return [t for t, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > whole.x1 + 1 or b.y1 > whole.y1 + 1]


def drawn(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    assert overlapping(figure) == []
    assert outside(figure) == []


IMAGES = {
    "CHW": torch.randn(3, 8, 6),
    "HWC": np.random.default_rng(0).random((8, 6, 3)),
    "HW": torch.randint(0, 255, (5, 9), dtype=torch.uint8),
    "1HW": torch.full((1, 8, 8), 7.0),
}


def explanation(query, proponents, opponents, **words):
    return plotting.explanation(plotting.Case(query, proponents, opponents), **words)


@pytest.mark.filterwarnings("ignore:.*stretched to its own range")
@pytest.mark.parametrize("kind", IMAGES)
def test_images_are_drawn_between_zero_and_one(kind):
    items = [Item(str(i), 1.0 - i, (IMAGES[kind], i)) for i in range(3)]
    figure, axes = explanation(Item("7", None, (IMAGES[kind], 4)), items[:1], items[2:])
    drawn(figure)
    assert titles(axes) == ["query 7\nlabel 4", "0\n+1\nlabel 0", "2\n-1\nlabel 2"]
    shown = axes[1].images[0].get_array()
    assert shown.shape[:2] == ((5, 9) if kind == "HW" else (8, 8) if kind == "1HW" else (8, 6))
    assert 0 <= shown.min() <= shown.max() <= 1


@pytest.mark.parametrize("k", [1, 3, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("long", [False, True])
def test_nothing_overlaps_with_long_labels_and_unequal_images(k, long):
    names = ["a class whose name nobody will ever read to its end"] * 3 if long else ["cat", "dog", "hen"]
    items = [
        Item(f"{10**12 + i} (base {10**12})" if long else str(i), 1e-7, (torch.rand(3, 5 + 9 * i, 40 - 4 * i), i % 3))
        for i in range(k)
    ]
    figure, axes = explanation(
        Item("3", None, (torch.rand(9, 30), 1)),
        items,
        items,
        method="A method of quite some name",
        drawing=plotting.Drawing(labels=names),
    )
    drawn(figure)
    assert len(axes) == 1 + 2 * k
    assert axes[0].get_title().endswith("…" if long else "dog")


def test_text_is_wrapped_cut_and_no_formula():
    text = "It costs $5 and $6.\n\n" + "words and more words " * 50
    figure, axes = explanation(Item("0", None, {"text": text, "label": "pos"}), [Item("1", 2.0, text)], [])
    drawn(figure)
    page = axes[1].texts[0].get_text()
    assert page.startswith("It costs \\$5 and \\$6.\n\nwords")
    assert page.endswith("…")
    assert len(page.splitlines()) == 11
    assert titles(axes)[0] == "query 0\npos"


@pytest.mark.parametrize(
    "word", ["W" * 60, "M" * 60, "i" * 200, "\u5e74" * 60, "x" * 200, "https://example.com/?q=" + "0123456789" * 9]
)
def test_no_word_is_wider_than_its_cell(word):
    item = (word, word)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no font for all characters
        figure, axes = explanation(Item("0", None, item), [Item(str(i), 1.0, item) for i in range(5)], [])
        drawn(figure)
        for cell in axes:
            boxes = [text.get_window_extent() for text in (*cell.texts, cell.title) if text.get_text()]
            inside = cell.get_window_extent()
            assert max(box.x1 for box in boxes) <= inside.x1 + 1
            assert min(box.x0 for box in boxes) >= inside.x0 - 1


def test_without_examples_the_scores_are_bars():
    figure, axes = explanation(
        Item("5"), [Item("1", 2.0), Item("2", 1.0)], [Item("9", -3.0)], method="TracInCP", units="loss"
    )
    drawn(figure)
    assert [bar.get_width() for bar in axes.patches] == [2.0, 1.0, -3.0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "2", "9"]
    assert axes.get_xlabel() == "score (loss)"


def test_no_proponents_and_opponents_at_all_is_drawn():
    drawn(explanation(Item("5"), [], [])[0])
    drawn(explanation(Item("5", None, "hello"), [], [])[0])


def test_a_render_of_ones_own_draws_anything():
    seen = []
    explanation(
        Item("5", None, {"a": 1}), [Item("1", 1.0, {"a": 2})], [], drawing=plotting.Drawing(lambda _, e: seen.append(e))
    )
    assert seen == [{"a": 1}, {"a": 2}]


def test_a_row_of_a_table_is_its_numbers_and_a_signal_is_a_curve():
    _, axes = explanation(Item("5", None, torch.tensor([1.5, -2.0])), [Item("1", 1.0, torch.rand(100))], [])
    texts = [t.get_text() for ax in axes for t in ax.texts]
    lines = [line for ax in axes for line in ax.lines]
    assert any("1.5" in text and "-2" in text for text in texts)
    assert any(len(line.get_xdata()) == 100 for line in lines)


@pytest.mark.parametrize("example", [torch.zeros(()), (torch.zeros(2, 3, 4, 5), 1), object(), {"a": object()}, ()])
def test_what_is_neither_image_nor_text_is_refused_with_the_way_out(example):
    with pytest.raises(ValueError, match=r"Expected an image .* or a text.* Pass `render=`"):
        explanation(Item("5", None, example), [], [])


@pytest.mark.parametrize(
    "values", [torch.rand(600) ** 6, torch.ones(3), torch.tensor([2.0]), torch.rand(50_000, dtype=torch.float64)]
)
def test_the_tail_of_self_influence_is_marked(values):
    figure, axes = plotting.self_influence(values, 0.1, method="TracInCP", units="loss " * 40)
    drawn(figure)
    counts = sum(bar.get_height() for bar in axes.patches)
    assert counts == values.numel()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[-1] == f"{3 if values.numel() == 3 else max(1, round(values.numel() * 0.1)):,} highest"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=f"`flagged_fraction` between 0 and 1, got {fraction}"):
        plotting.self_influence(torch.ones(3), fraction)


def test_pyplot_stays_untouched():
    import sys

    if "matplotlib.pyplot" in sys.modules:
        before = sys.modules["matplotlib.pyplot"].get_fignums()
        plotting.self_influence(torch.rand(30))
        assert sys.modules["matplotlib.pyplot"].get_fignums() == before
    else:
        plotting.self_influence(torch.rand(30))
        assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r'pip install "lightning-influence\[plot\]"'):
        plotting.self_influence(torch.rand(3))


SCORES = Scores(
    torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]]),
    None,
    torch.tensor([1, 2, 5, 6]),
    torch.tensor([3, 4]),
    method="TracInCP",
    base=(torch.tensor([1, 2, 5, 7]), None),
)


def test_scores_draw_their_proponents_and_opponents():
    train = [(torch.rand(4, 4), i) for i in range(7)]
    figure, axes = SCORES.plot(k=9, train=train, queries=train)
    drawn(figure)
    assert titles(axes) == [
        "query 3\nlabel 3",
        "5 (base 5)\n+2\nlabel 5",
        "1 (base 1)\n+0.5\nlabel 1",
        "2 (base 2)\n-1\nlabel 2",
    ]
    assert [bar.get_width() for bar in SCORES.plot(query=4, k=2)[1].patches] == [4.0, 3.0]


def test_a_query_that_was_not_scored_is_refused():
    with pytest.raises(ValueError, match=r"`query` to be among the 2 ids 3 to 4 that were scored, got \[0\]"):
        SCORES.plot(query=0)
    with pytest.raises(ValueError, match="`k` between 1 and 4"):
        SCORES.plot(k=0)


def test_self_scores_draw_their_distribution():
    figure, axes = SelfScores(torch.arange(40), torch.rand(40), "TracInCP", units="arbitrary").plot(0.2)
    drawn(figure)
    assert axes.get_xlabel() == "self-influence (no unit)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["32 others", "8 highest"]


@pytest.mark.parametrize(
    ("style", "kind"),
    [("default", "image"), ("dark_background", "image"), ("dark_background", "nothing")]
    + [pytest.param("default", kind, marks=pytest.mark.slow) for kind in ("text", "row", "named row", "curve")],
)
def test_many_queries_are_rows_on_light_and_dark(style, kind):
    examples = {
        "image": lambda i: (torch.rand(3, 6 + 7 * i, 30 - 4 * i), i % 3),
        "text": lambda i: {"text": "words and more words " * (1 + 9 * i), "label": i % 3},
        "row": lambda i: (torch.rand(12) * 10**i, i % 3),
        "named row": lambda i: {"the name of a column that is long": 1e-9 * i, "b": "x" * 40, "label": 1},
        "curve": lambda i: (torch.rand(200), float(i)),
        "nothing": lambda i: None,
    }
    items = [Item(f"{i} (base {10**9})", 10.0**i, examples[kind](i)) for i in range(5)]
    cases = [plotting.Case(Item("7", None, items[i].example, i), items[:i], items[i:]) for i in range(3)]
    with matplotlib.style.context(style):
        figure, axes = plotting.explanations(cases, method="TracInCP", units="loss", drawing=plotting.Drawing())
        drawn(figure)
    assert len(axes) == 3
    assert all(t.get_color() != figure.get_facecolor() for t in figure.findobj(matplotlib.text.Text) if t.get_text())


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_influence_by_class_is_a_map_of_means(style):
    values = torch.tensor([[1.0, 3.0, -5.0], [2.0, 2.0, 0.5]])
    scores = Scores(values, None, torch.arange(3), torch.arange(2), method="TracInCP")
    train = [(torch.zeros(2), 0), (torch.zeros(2), torch.tensor(0)), {"x": 1, "label": 4}]
    with matplotlib.style.context(style):
        figure, axes = scores.plot_classes(train, torch.tensor([7, 7]), labels=["zero", "one"])
        drawn(figure)
    assert axes.images[0].get_array().tolist() == [[2.0, -2.25]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["zero", "4"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["7"]


def test_the_highest_examples_are_drawn_with_what_the_model_says():
    found = SelfScores(torch.arange(12), torch.arange(12.0), "labels", quantity="loss", checkpoints=[1, 2])
    data = [(torch.rand(3, 4, 4), i % 2) for i in range(12)]
    found.opinions = lambda side, ids: {i: Opinion(1.0, 1 - i % 2) for i in ids}
    figure, axes = found.plot_top(7, data, labels=["cat", "dog"])
    drawn(figure)
    assert titles(axes)[0] == "11\n11\ndog\npredicted cat"
    assert len(axes) == 7
    assert figure.get_suptitle() == "labels: the 7 training examples of highest mean loss over 2 checkpoints"
    with pytest.raises(ValueError, match="Expected `train` to be the training Dataset, got None"):
        found.plot_top()


def test_a_query_has_what_the_model_thinks_of_it():
    data = [(torch.rand(4, 4), i % 2) for i in range(7)]
    scores = Scores(SCORES.values, None, SCORES.train_ids, SCORES.query_ids, method="TracInCP")
    scores.opinions = lambda side, ids: {i: Opinion(2.5, 1, 0.375, False) for i in ids}
    figure, axes = scores.plot(4, k=1, train=data, queries=data, labels=["cat", "dog"])
    drawn(figure)
    assert titles(axes)[0] == "query 4\ncat\npredicted dog\nat 38%, loss 2.5"
    assert titles(scores.plot(4, 1, data, data, predictions={4: 0})[1])[0] == "query 4\nlabel 0\npredicted 0\nloss 2.5"
    figure, axes = scores.plot(4, labels=["cat", "dog"])
    drawn(figure)
    assert axes.get_title() == "TracInCP: influence on query 4\npredicted dog, at 38%, loss 2.5"


def test_a_regression_has_targets():
    data = [(torch.rand(3), torch.tensor([float(i)])) for i in range(7)]
    scores = Scores(SCORES.values, None, SCORES.train_ids, SCORES.query_ids, method="TracInCP")
    scores.opinions = lambda side, ids: {i: Opinion(0.25, 2.5) for i in ids}
    assert titles(scores.plot(4, k=1, train=data, queries=data)[1]) == [
        "query 4\ntarget 4\npredicted 2.5\nloss 0.25",
        "6\n+4\ntarget 6",
    ]


def test_names_and_looks_travel_along_with_the_file(tmp_path):
    images = [(torch.rand(3, 4, 5), i % 2) for i in range(7)]
    scores = Scores(SCORES.values, None, SCORES.train_ids, SCORES.query_ids, method="TracInCP")
    scores.opinions = lambda side, ids: {i: Opinion(2.5, 1, 0.375, False) for i in ids}
    scores.save(tmp_path / "s.arrow", train=images, queries=images, labels=["cat", "dog"])
    loaded = Scores.load(tmp_path / "s.arrow")
    told = ["query 4\ncat\npredicted dog\nat 38%, loss 2.5", "6\n+4\ncat"]
    for found in (scores, pickle.loads(pickle.dumps(scores)), loaded):
        axes = found.plot(4, k=1)[1]
        assert titles(axes) == told
        torch.testing.assert_close(
            torch.as_tensor(axes[1].images[0].get_array()), images[6][0].movedim(0, 2).double(), atol=0.003, rtol=0
        )
        assert titles(found.plot(4, k=1, train=images, queries=images)[1]) == told
    rows = [(torch.tensor([1.5 * i, i]), "x") for i in range(7)]
    found = SelfScores(torch.arange(7), torch.arange(7.0), "M")
    found.save(tmp_path / "self.arrow", train=rows, columns=["a", "b"])
    axes = SelfScores.load(tmp_path / "self.arrow").plot_top(2)[1]
    assert [text.get_text() for text in axes[0].texts] == ["a", "9", "b", "6"]


def test_names_are_those_of_whichever_dataset_has_them():
    train = [(torch.rand(4, 4), i % 2) for i in range(7)]
    queries = type("Named", (list,), {"class_names": ["cat", "dog"]})(train)
    assert titles(SCORES.plot(4, 1, train, queries)[1]) == ["query 4\ncat", "6 (base 7)\n+4\ncat"]
    few = Scores(SCORES.values[:, :2], None, torch.arange(2), SCORES.query_ids, method="M")
    assert [t.get_text() for t in few.plot_classes(train, queries)[1].get_xticklabels()] == ["cat", "dog"]


def test_zeros_of_one_hot_columns_give_way_to_what_tells():
    row = torch.zeros(60)
    row[[0, 30, 59]] = torch.tensor([2.5, 1.0, 1.0])
    columns = [f"c{i}" for i in range(60)]
    axes = SCORES.plot(3, 1, [(row, 1)] * 7, [(row, 1)] * 7, columns=columns)[1]
    assert [t.get_text() for t in axes[1].texts] == ["c0", "2.5", "c30", "1", "c59", "1", "and 57 more", ""]


def test_targets_of_a_regression_are_no_classes():
    data = [(torch.zeros(2), 0.5 + i) for i in range(20)]
    scores = Scores(torch.rand(20, 20), None, torch.arange(20), torch.arange(20), method="M")
    with pytest.raises(ValueError, match=r"Expected `train` to have classes, got numbers such as 0\.5"):
        scores.plot_classes(data, data)


def test_classes_that_are_missing_are_refused():
    with pytest.raises(ValueError, match="Expected `train` to be a Dataset or the class of each id, got None"):
        SCORES.plot_classes()
    with pytest.raises(ValueError, match="Expected `train` to hold 4 classes, got shape \\[3\\]"):
        SCORES.plot_classes(torch.zeros(3))
    with pytest.raises(ValueError, match="example of `queries` to have a class, got none for \\[3, 4\\]"):
        SCORES.plot_classes(torch.zeros(4), [torch.rand(3)] * 5)


def test_scores_draw_what_is_at_hand_and_what_was_predicted():
    scores = Scores(SCORES.values, None, SCORES.train_ids, SCORES.query_ids, method="TracInCP")
    scores.at_hand = ([(torch.rand(4, 4), i) for i in range(7)],) * 2
    axes = scores.plot(4, k=1, predictions={4: torch.tensor(6)}, labels={6: "six"})[1]
    assert titles(axes) == ["query 4\nlabel 4\npredicted six", "6\n+4\nsix"]
    many = scores.plot([3, 4], k=1)[1]
    assert [titles(row)[0] for row in many] == ["query 3\nlabel 3", "query 4\nlabel 4"]
    assert pickle.loads(pickle.dumps(scores)).at_hand == (None, None)
    with pytest.raises(ValueError, match="`query` to be an id or several, got none"):
        scores.plot([])
