"""The page's data, thumbnails and files; `test_page.py` opens it in a browser."""

import base64
import builtins
import json
import re

import numpy as np
import pandas
import pytest
import torch

from lightning_influence import Scores, SelfScores, read_decisions
from lightning_influence.report.album import Album, Showing, collect, png

HOSTILE = "</script><script>alert(1)</script><!-- \"quoted\" & 'single' \u2028 \u202eright to left שלום 🦊"
VALUES = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
TRAIN_IDS, QUERY_IDS = torch.tensor([1, 2, 5, 6]), torch.tensor([3, 4])
TEXTS = [{"text": f"text {i}", "label": i % 2} for i in range(8)]


def scores(**more):
    return Scores(VALUES, None, TRAIN_IDS, QUERY_IDS, method="TracInCP", base=(TRAIN_IDS + 10, None), **more)


def itself():
    return SelfScores(TRAIN_IDS, torch.tensor([0.1, 0.4, 0.3, 0.2]), "TracInCP")


def embedded(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL).group(1))


def test_the_page_holds_scores_explanations_and_examples(tmp_path):
    path = scores().report(
        tmp_path / "page.html",
        self_scores=itself(),
        train=TEXTS,
        queries=TEXTS,
        labels=["cat", "dog"],
        predictions={4: 1},
    )
    data = embedded(path)
    assert data["train"]["id"] == [1, 2, 5, 6]
    assert data["train"]["base"] == [11, 12, 15, 16]
    assert [c["title"] for c in data["train"]["columns"]] == ["Self-influence", "Influence on all queries (sum)"]
    assert data["train"]["columns"][1]["scores"] == [1.5, 1.0, 5.0, 4.0]
    assert data["queries"]["pairs"] == [[[2, 2.0], [0, 0.5], [1, -1.0]], [[3, 4.0], [2, 3.0], [1, 2.0], [0, 1.0]]]
    assert data["train"]["looks"]["2"] == {"kind": "text", "value": "text 5", "class": "dog"}
    assert data["queries"]["looks"]["1"] == {"kind": "text", "value": "text 4", "class": "cat", "prediction": "dog"}
    assert "ids alone" not in path.read_text("utf-8")


def test_without_data_the_page_says_that_it_shows_ids_alone(tmp_path):
    text = scores(notes=[HOSTILE]).report(tmp_path / "page.html").read_text("utf-8")
    assert "shown by their ids alone" in text
    assert "<script>alert" not in text


def test_kept_scores_are_summed_and_explained(tmp_path):
    from lightning_influence.numerics.topk import top_k
    from lightning_influence.scores import TopK

    top = tuple(TopK(*top_k(VALUES, TRAIN_IDS, 2, largest)) for largest in (True, False))
    kept = Scores(None, top, TRAIN_IDS, QUERY_IDS, method="TracInCP")
    data = embedded(kept.report(tmp_path / "page.html"))
    # Of the second query 2.0 and 1.0 are kept as its lowest, but they are no opponents.
    assert data["train"]["columns"][0] == {
        "title": "Influence on all queries (sum of the scores kept)",
        "scores": [0.5, -1.0, 5.0, 4.0],
        "meaning": "Above 0, training on the example made the queries better in all, below 0 worse.",
    }


def test_without_a_unit_no_sum_is_shown_but_the_mean_share_of_each_querys_strongest(tmp_path):
    path = scores(units="arbitrary").report(tmp_path / "page.html")
    column = embedded(path)["train"]["columns"][0]
    expected = [sum(row[i].item() / max(map(abs, row.tolist())) for row in VALUES) / 2 for i in range(4)]
    assert column["title"] == "Influence on all queries (mean share)"
    assert column["scores"] == pytest.approx(expected)
    assert "Scores without a unit cannot be added up" in path.read_text("utf-8")


def test_the_page_says_how_more_examples_are_shown_by_where_they_come_from(tmp_path):
    few = {"train": TEXTS, "queries": TEXTS, "megabytes": 3e-4}
    told = scores().report(tmp_path / "a.html", **few).read_text("utf-8")
    assert "A larger `megabytes` for `report`" in told
    path = scores().save(tmp_path / "s.arrow", **few)
    assert "album=" in Scores.load(path).report(tmp_path / "b.html").read_text("utf-8")


def test_names_of_classes_that_are_given_later_are_used_where_the_data_are_here(tmp_path):
    found = scores()
    found.at_hand = (TEXTS, TEXTS)
    found.save(tmp_path / "s.arrow", megabytes=1)
    shown = embedded(found.report(tmp_path / "p.html", labels=["cat", "dog"]))["train"]["looks"]["2"]
    assert shown["class"] == "dog"
    kept = embedded(Scores.load(tmp_path / "s.arrow").report(tmp_path / "k.html"))["train"]["looks"]["2"]
    assert kept["class"] == "1"


def test_many_queries_have_fewer_explaining_examples_each(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_influence.scores.page._EXPLAINING", 5)
    path = scores().report(tmp_path / "p.html", k=2)
    assert [len(pairs) for pairs in embedded(path)["queries"]["pairs"]] == [2, 1]
    assert "For each query, the 1 strongest proponent and as many opponents" in path.read_text("utf-8")


def test_no_line_ends_within_an_abbreviation(tmp_path):
    found = scores(notes=["EK-FAC of the Fisher on CIFAR-10, half-way"])
    assert "EK\u2011FAC of the Fisher on CIFAR\u201110, half-way" in found.report(tmp_path / "p.html").read_text(
        "utf-8"
    )
    assert "EK\u2011FAC" in found._repr_html_()
    assert "EK-FAC" in repr(found)


@pytest.mark.parametrize("render", [lambda axes, example: axes.plot([1, 2]), lambda example: example["text"].upper()])
def test_a_render_that_draws_and_one_that_returns_serve_figures_and_pages(tmp_path, render):
    found = scores()
    looks = embedded(found.report(tmp_path / "p.html", train=TEXTS, queries=TEXTS, render=render))["train"]["looks"][
        "2"
    ]
    assert looks["class"] == "1"
    assert looks["kind"] in ("image", "text")
    assert looks["kind"] == "image" or looks["value"] == "TEXT 5"
    figure, axes = found.plot(train=TEXTS, queries=TEXTS, render=render)
    assert axes[0].lines or "TEXT" in axes[0].texts[0].get_text()
    assert figure.axes


def test_hostile_text_stays_inside_its_json(tmp_path):
    data = [{"text": HOSTILE, "label": HOSTILE}] * 8
    path = scores().report(tmp_path / "page.html", train=data, queries=data)
    assert embedded(path)["train"]["looks"]["0"] == {"kind": "text", "value": HOSTILE, "class": HOSTILE}
    assert path.read_text("utf-8").count("<script") == 2


def test_saved_scores_keep_what_their_examples_look_like(tmp_path):
    fresh = scores()
    fresh.at_hand = (TEXTS, TEXTS)
    fresh.save(tmp_path / "s.arrow", labels=["cat", "dog"], render=lambda example: example["text"].upper())
    loaded = Scores.load(tmp_path / "s.arrow")
    assert loaded.album.train[5] == {"kind": "text", "value": "TEXT 5", "class": "dog"}
    assert embedded(loaded.report(tmp_path / "page.html"))["queries"]["looks"]["0"]["value"] == "TEXT 3"
    loaded.save(tmp_path / "again.arrow")
    assert Scores.load(tmp_path / "again.arrow").album == loaded.album
    assert Scores.load(scores().save(tmp_path / "bare.arrow")).album is None
    itself().save(tmp_path / "self.arrow", train=TEXTS)
    page = SelfScores.load(tmp_path / "self.arrow").report(tmp_path / "self.html")
    assert embedded(page)["train"]["looks"]["1"]["value"] == "text 2"
    assert embedded(page)["queries"] is None


def test_a_second_save_shows_examples_as_it_was_asked_to(tmp_path):
    for fresh in (scores(), itself()):
        fresh.save(tmp_path / "s.arrow", True, train=TEXTS, labels=["cat", "dog"])
        fresh.at_hand = (TEXTS, None)
        fresh.save(tmp_path / "s.arrow", True, labels=["good", "bad"])
        assert type(fresh).load(tmp_path / "s.arrow").album.train[5]["class"] == "bad"
        fresh.save(tmp_path / "s.arrow", True, megabytes=1)
        assert type(fresh).load(tmp_path / "s.arrow").album.train[5]["class"] == "bad"


def test_nothing_to_show_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected data to show with `render`, got none: .* Pass `train=`"):
        scores().save(tmp_path / "s.arrow", render=str)
    with pytest.raises(ValueError, match="Expected `self_scores` of the same 4 training examples, got 2 others"):
        scores().report(tmp_path / "p.html", self_scores=SelfScores(torch.arange(2), torch.rand(2), "TracInCP"))
    with pytest.raises(IsADirectoryError, match="Expected `path` to name a file, got the folder"):
        scores().report(tmp_path)


def test_an_album_is_filled_up_to_its_size_strongest_first():
    data = [{"text": "x" * 1000}] * 100
    album = collect(data, data, iter([7, 7, 3, *range(100)]), range(100), Showing(), 0.03)
    assert list(album.queries) == list(range(10))
    assert list(album.train)[:3] == [7, 3, 0]
    assert len(album.train) == 19
    assert len(album.to_json()) < 35_000
    assert Album.from_json(album.to_json()) == album


def test_predictions_are_known_without_the_data():
    album = collect(None, None, [1], [3, 4], Showing(predictions=torch.arange(9), labels={3: "three"}), 1.0)
    assert album.train == {}
    assert album.queries[3] == {"kind": "nothing", "value": None, "prediction": "three"}


@pytest.mark.parametrize("shape", [(5, 7), (4, 6, 3), (200, 100, 3)])
def test_thumbnails_are_the_image_at_most_96_pixels_long(shape):
    image = pytest.importorskip("PIL.Image")
    import io

    given = torch.rand(shape, dtype=torch.float64)
    entry = Showing().entry((given, 1))
    shown = np.asarray(image.open(io.BytesIO(base64.b64decode(entry["value"]))))
    if max(shape) > 96:
        assert shown.shape == (96, 48, 3)
        assert abs(shown.mean() / 255 - float(given.mean())) < 0.01
    else:
        assert np.array_equal(shown, (given * 255).round().numpy().astype(np.uint8))
    assert png(given).startswith(b"\x89PNG")


def test_rows_and_curves_are_shortened():
    curve = Showing().entry(torch.arange(1000.0))["value"]
    assert (len(curve), curve[0], curve[-1]) == (120, 0.0, 999.0)
    row = Showing(columns=[f"c{i}" for i in range(60)]).entry(torch.arange(60))["value"]
    assert row[3] == ["c3", "3"]
    assert row[-1] == ["", "and 20 more"]
    assert len(Showing().entry("x" * 5000)["value"]) == 1500


def test_decisions_are_read_back(tmp_path):
    path = tmp_path / "decisions.csv"
    path.write_text("train_id,train_base_id,decision\r\n9,109,wrong label\r\n3,103,fine\r\n4,104,wrong label\r\n")
    found = read_decisions(path)
    assert found.train_ids.tolist() == [4, 9]
    assert found.base_ids.tolist() == [104, 109]
    assert read_decisions(path, "unsure").train_ids.dtype == torch.int64
    path.write_text("\ufefftrain_id;train_base_id;decision\n3;103;fine\n\n", encoding="utf-8")
    assert read_decisions(path, "fine").train_ids.tolist() == [3]
    path.write_text("decision,train_id,why\nwrong target,4,blurred\nfine,2,\n")  # as a regression's page calls it
    assert read_decisions(path, "wrong target").train_ids.tolist() == [4]
    assert read_decisions(path).train_ids.tolist() == [4]
    assert read_decisions(path).base_ids is None
    path.write_text("train_id,decision\n4\n")
    with pytest.raises(ValueError, match=r"an id and a decision in row 2 of .*, got \['4'\]"):
        read_decisions(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"to begin with the columns train_id, train_base_id .* and decision, got \[\]"),
        ("id,decision\n1,fine\n", r"got \['id', 'decision'\]"),
        (
            "train_id,train_base_id,decision\nx,1,fine\n",
            r"two ids and a decision in row 2 of .*, got \['x', '1', 'fine'\]",
        ),
        ("train_id,train_base_id,decision\n1,1,good\n", "a decision among 'wrong label', .* in row 2 .*, got 'good'"),
        (
            "train_id,train_base_id,decision\n1,1,fine\n1,1,unsure\n",
            "one decision per training example .*, got two for 1",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_decisions(tmp_path / "d.csv")


def test_wrong_asking_for_decisions_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected a file of decisions at"):
        read_decisions(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="Expected `decision` to be one of 'wrong label', 'fine', 'unsure', got 'bad'"):
        read_decisions(tmp_path / "none.csv", "bad")


def test_notebooks_get_the_paragraph_and_a_table_as_text():
    html = scores(notes=["<b>bold</b>"])._repr_html_()
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    html = re.sub(r"<td [^>]*>", "<td>", html.replace("\u00a0", " "))
    assert "<td>3</td><td>5 (base 15) (+2), 1 (base 11) (+0.5)</td><td>2 (base 12) (-1)</td>" in html
    assert "<td>2</td><td>0.4</td>" in re.sub(r"<td [^>]*>", "<td>", itself()._repr_html_())


def test_notebooks_get_the_most_telling_queries_and_classes_of_an_album(tmp_path):
    from lightning_influence.report import Opinion

    found = scores()
    found.opinions = lambda side, ids: {i: Opinion(1.0, int(i == 4), 0.9, i != 4) for i in ids}
    found.save(tmp_path / "s.arrow", train=TEXTS, queries=TEXTS, labels=["cat", "dog"])
    html = Scores.load(tmp_path / "s.arrow")._repr_html_()
    cells = re.findall(r"<td [^>]*>(.*?)</td>", html.replace("\u00a0", " "))
    assert cells[:3] == ["4", "cat", "dog"]
    assert cells[5:8] == ["3", "dog", "cat"]
    assert cells[8].startswith("5 (base 15) dog (+2)")
    lone = itself()
    lone.save(tmp_path / "self.arrow", train=TEXTS, labels={torch.tensor(1).numpy()[()]: "dog"})
    cells = re.findall(r"<td [^>]*>(.*?)</td>", SelfScores.load(tmp_path / "self.arrow")._repr_html_())
    assert cells[:6] == ["2", "0", "0.4", "5", "dog", "0.3"]


def test_predictions_that_are_kept_alone_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = scores()
    found.save(tmp_path / "s.arrow", train=TEXTS, predictions={3: 1, 4: 0}, columns=("a", "b"))
    axes = Scores.load(tmp_path / "s.arrow").plot(4, k=1, labels=["cat", "dog"])[1]
    assert axes[0].get_title() == "query 4\npredicted 0"


def test_without_jinja_the_error_names_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "jinja2":
            raise ImportError("No module named 'jinja2'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r'pip install "lightning-influence\[report\]"'):
        scores().report(tmp_path / "page.html")


def judging(side, ids):
    from lightning_influence.report import Opinion

    return {i: Opinion(0.5 + i, 1, 0.25, False) for i in ids}


def test_the_page_holds_the_models_opinions_beside_predictions_that_were_given(tmp_path):
    found = scores()
    found.at_hand, found.opinions = (TEXTS, TEXTS), judging
    data = embedded(found.report(tmp_path / "page.html", labels=["cat", "dog"], predictions={4: 0}))
    assert data["train"]["looks"]["2"].items() >= {"prediction": "dog", "probability": 0.25, "loss": 5.5}.items()
    assert data["queries"]["looks"]["0"]["prediction"] == "dog"
    given = data["queries"]["looks"]["1"]
    assert (given["prediction"], given["loss"]) == ("cat", 4.5)
    assert "probability" not in given


def test_names_of_classes_are_those_of_the_dataset():
    from torch.utils.data import Subset, TensorDataset

    from lightning_influence.plotting.example_view import classes_of

    data = TensorDataset(torch.zeros(3, 2))
    assert classes_of(data) is None
    data.classes = ["cat", ("dog", "hound")]
    assert classes_of(Subset(Subset(data, [1, 2]), [0])) == ["cat", "dog"]
    data.classes = [0, 1]
    assert classes_of(data) is None


def test_trackers_tell_what_the_first_examples_of_a_table_are():
    from lightning_influence.scores.tracked import described

    found = scores()
    found.opinions = judging
    table = ["query_id", "train_id"], [[3, 1], [4, 6]]
    columns, rows = described(found, table, {"train": TEXTS, "queries": [None] * 3 + [5, 7], "labels": ["cat", "dog"]})
    assert columns[2:6] == ["query_predicted", "query_probability", "query_loss", "train_class"]
    assert rows[1][2:] == ["dog", 0.25, 4.5, "cat", "dog", 0.25, 6.5, "text 6"]
    assert described(scores(), table, {}) == table
    assert table[1] == [[3, 1], [4, 6]]


def test_the_query_that_tells_most_is_the_wrongly_predicted_one_of_highest_loss():
    from lightning_influence.report import Opinion
    from lightning_influence.scores.tracked import telling_query

    found = scores()
    assert telling_query(found, [3, 4]) == (None, "")
    told = {
        3: Opinion(0.5, 1, 0.9, False),
        4: Opinion(0.4, 0, 0.9, False),
        5: Opinion(9.0, 0, 0.9, True),
        6: Opinion(None),
    }
    found.opinions = lambda side, ids: {i: told[i] for i in ids}
    query, why = telling_query(found, [3, 4, 5, 6])
    assert query == 3
    assert "2 wrongly predicted among 3 queries" in why
    assert telling_query(found, [5, 6])[0] == 5


def test_a_dataset_that_is_given_holds_the_examples_that_were_scored(tmp_path):
    from torch.utils.data import DataLoader, Subset

    under = [{"text": f"text {i}", "label": i % 2} for i in range(30)]
    chosen = [9, 8, 7, 20, 4, 2, 29]

    def shown(train, base=torch.tensor(chosen)[TRAIN_IDS]):
        found = Scores(VALUES, None, TRAIN_IDS, QUERY_IDS, method="M", base=(base, None))
        return embedded(found.report(tmp_path / "p.html", train=train))["train"]["looks"]["2"]["value"]

    subset = Subset(under, chosen)
    nested = Subset(Subset(under, list(range(29, -1, -1))), [29 - i for i in chosen])
    for given in (subset, nested, DataLoader(subset), under, [subset[i] for i in range(7)], list(under)):
        assert shown(given) == "text 2"
    with pytest.raises(ValueError, match=r"the Subset that was scored, got another: its example 1 is 3 .* and 8 was"):
        shown(Subset(under, list(range(2, 9))))
    with pytest.raises(ValueError, match="of which the last has the id 6, got 5"):
        shown(under[:5])
    assert shown(under[:8], TRAIN_IDS) == "text 5"
    with pytest.warns(UserWarning, match="is taken for the former. If it is the latter, pass the Subset"):
        assert shown(under[:7], torch.tensor([6, 5, 1, 0])) == "text 5"


def test_the_page_says_that_colours_may_be_wrong_also_for_a_file(tmp_path):
    images = [(torch.rand(3, 4, 4) * 3 - 1, 0) for _ in range(7)]
    with pytest.warns(UserWarning, match="stretched to its own range") as told:
        path = scores().save(tmp_path / "s.arrow", train=images)
    assert len(told) == 1
    assert "stretched to its own range" in Scores.load(path).report(tmp_path / "p.html").read_text("utf-8")
    fine = scores().report(tmp_path / "p.html", train=[(torch.rand(3, 4, 4), 0)] * 7).read_text("utf-8")
    assert "stretched" not in fine


def test_a_table_and_a_name_are_told_apart_from_data_and_self_scores():
    scores = Scores(torch.ones(1, 2), None, torch.arange(2), torch.arange(1), method="CP")
    with pytest.raises(TypeError, match=r"Expected `train` to be a Dataset, got a DataFrame.*to_dict\('records'\)"):
        scores.report("x.html", train=pandas.DataFrame({"a": [1, 2]}), queries=["q"])
    with pytest.raises(TypeError, match="Expected `self_scores` to be `SelfScores`, got 'labels'"):
        scores.report("x.html", self_scores="labels")
