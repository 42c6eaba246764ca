"""What was written into a logger, read back by its own tools."""

import builtins
import csv
import importlib
import logging

import numpy as np
import pytest
import torch

from lightning_influence import loggers as trackers
from lightning_influence.loggers import tensorboard
from lightning_influence.loggers.summary import Histogram
from lightning_influence.scores import Scores, SelfScores

pytest.importorskip("tensorboard")

PACKAGES = [name for name in ("pytorch_lightning", "lightning.pytorch") if importlib.util.find_spec(name.split(".")[0])]


@pytest.fixture(params=PACKAGES)
def kinds(request):
    return importlib.import_module(f"{request.param}.loggers")


SCORES = Scores(
    torch.tensor([[0.5, -1.0, 2.0], [1.0, 2.0, 3.0]]),
    None,
    torch.tensor([0, 4, 7]),
    torch.tensor([3, 8]),
    method="TracInCP",
    base=(torch.tensor([10, 14, 17]), None),
    diagnostics={"residual": 0.125},
)
SELF = SelfScores(torch.arange(20), torch.arange(20.0), "TracInCP", diagnostics={"self_residual": 0.25})


def events(logger):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_tensorboard_holds_scalars_table_histogram_and_figures(kinds, tmp_path):
    logger = kinds.TensorBoardLogger(tmp_path)
    SCORES.log(logger, step=12)
    SELF.log([logger], step=12)
    found = events(logger)
    assert {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"] if tag.startswith("influence/")} == {
        "influence/TracInCP/top_proponent_mean": 2.5,
        "influence/TracInCP/top_proponent_max": 3.0,
        "influence/TracInCP/opponents_share": pytest.approx(1 / 6),
        "influence/TracInCP/residual": 0.125,
        "influence/TracInCP/self_residual": 0.25,
        "influence/TracInCP/self_mean": 9.5,
        "influence/TracInCP/self_top": 19.0,
    }
    assert found.Scalars("influence/TracInCP/self_mean")[0].step == 12
    text = found.Tensors("influence/TracInCP/scores_table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[0] == "| query_id | train_id | score | rank | train_base_id | side |"
    assert text.splitlines()[2] == "| 3 | 7 | 2 | 1 | 17 | proponent |"
    assert text.splitlines()[4] == "| 3 | 4 | -1 | 3 | 14 | opponent |"
    assert "influence/TracInCP/self_influence_table/text_summary" in found.Tags()["tensors"]
    counted = found.Histograms("influence/TracInCP/self_influence_histogram")[0].histogram_value
    assert (counted.num, counted.min, counted.max, counted.sum, counted.sum_squares) == (20, 0.0, 19.0, 190.0, 2470.0)
    assert sum(counted.bucket) == 20
    assert (counted.bucket_limit[0], counted.bucket_limit[-1], counted.bucket[0]) == (0.0, 19.0, 0.0)
    assert sum(found.Histograms("influence/TracInCP/scores_histogram")[0].histogram_value.bucket) == 6
    about = found.Tensors("influence/TracInCP/about/text_summary")[0].tensor_proto.string_val[0].decode()
    assert " ".join(about.split()) == " ".join(repr(SCORES).split())
    assert "influence/TracInCP/about_self_influence/text_summary" in found.Tags()["tensors"]
    images = ["influence/TracInCP/explanation_figure", "influence/TracInCP/self_influence_figure"]
    assert sorted(found.Tags()["images"]) == images
    # its page shows one kind only of what has one name
    tags = [tag for kind in ("images", "histograms", "scalars", "tensors") for tag in found.Tags()[kind]]
    assert len(tags) == len(set(tags))
    assert all(found.Images(tag)[0].encoded_image_string.startswith(b"\x89PNG") for tag in images)


def test_csv_holds_scalars_tables_and_figures_beside_the_metrics(kinds, tmp_path):
    logger = kinds.CSVLogger(tmp_path)
    SCORES.log([logger], step=12)
    SELF.log([logger], step=12)
    folder = tmp_path / "lightning_logs" / "version_0"
    first, second = rows(folder / "metrics.csv")
    assert float(first["influence/TracInCP/top_proponent_max"]) == 3.0
    assert float(second["influence/TracInCP/self_mean"]) == 9.5
    assert (first["step"], second["step"]) == ("12", "12")
    table = rows(folder / "influence_TracInCP_scores.csv")
    assert [row["train_id"] for row in table if row["query_id"] == "3"] == ["7", "0", "4"]
    assert table[0] == {
        "query_id": "3", "train_id": "7", "score": "2.0", "rank": "1", "train_base_id": "17", "side": "proponent",
    }  # fmt: skip
    assert rows(folder / "influence_TracInCP_self_influence.csv")[0]["train_id"] == "19"
    bins = rows(folder / "influence_TracInCP_self_influence_histogram.csv")
    assert sum(int(row["count"]) for row in bins) == 20
    assert (float(bins[0]["low"]), float(bins[-1]["high"])) == (0.0, 19.0)
    assert (folder / "influence_TracInCP_about.txt").read_text() == repr(SCORES)
    for what in ("explanation", "self_influence"):
        assert (folder / f"influence_TracInCP_{what}.png").read_bytes().startswith(b"\x89PNG")


def test_after_finalize_the_metrics_of_the_fit_are_still_there(kinds, tmp_path):
    table, board = kinds.CSVLogger(tmp_path / "csv"), kinds.TensorBoardLogger(tmp_path / "tb")
    for logger in (table, board):
        logger.log_metrics({"loss": 0.25}, step=3)
        logger.finalize("success")
    SCORES.log([table, board], step=4)
    fit, influence = rows(f"{table.log_dir}/metrics.csv")
    assert (fit["loss"], fit["step"], fit["influence/TracInCP/top_proponent_max"]) == ("0.25", "3", "")
    assert (influence["loss"], influence["influence/TracInCP/top_proponent_max"]) == ("", "3.0")
    found = events(board)
    assert found.Scalars("loss")[0].value == 0.25
    assert found.Scalars("influence/TracInCP/top_proponent_max")[0].step == 4


@pytest.mark.parametrize("nothing", [None, [], False, "dummy"])
def test_no_logger_is_no_work_and_no_error(kinds, nothing, monkeypatch, tmp_path):
    if nothing == "dummy":
        nothing = [importlib.import_module(f"{kinds.__name__}.logger").DummyLogger()]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "log_influence", lambda *_, **__: pytest.fail("nobody listens"))
    SCORES.log(nothing)
    SELF.log(nothing)
    assert list(tmp_path.iterdir()) == []


def test_other_processes_write_nothing(kinds, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.rank_zero_only, "rank", 1)
    SCORES.log([kinds.CSVLogger(tmp_path)])
    assert list(tmp_path.rglob("*.csv")) == []


class Bare:
    """A logger that knows scalars only."""

    def __init__(self):
        self.got = {}

    def log_metrics(self, metrics, step=None):
        self.got.update(metrics)

    def save(self):
        self.got["saved"] = True


class Broken(Bare):
    def log_metrics(self, metrics, step=None):
        raise ConnectionError("no network")


def test_an_unknown_logger_gets_scalars_and_a_note(caplog):
    logger = Bare()
    with caplog.at_level(logging.WARNING, "lightning_influence.loggers"):
        SELF.log([logger], name="my name")
    assert logger.got == {
        "influence/my name/self_mean": 9.5,
        "influence/my name/self_top": 19.0,
        "influence/my name/self_residual": 0.25,
        "saved": True,
    }
    assert [record.getMessage() for record in caplog.records] == [
        "`Bare` supports only the scalars of the influence of 'my name'."
    ]


def test_a_logger_that_fails_is_named_and_the_others_get_theirs():
    other = Bare()
    with pytest.warns(
        UserWarning, match=r"`Broken` failed to log the influence of 'TracInCP' \(ConnectionError: no network\)"
    ):
        SCORES.log([Broken(), other])
    assert other.got["influence/TracInCP/top_proponent_max"] == 3.0


def test_a_subclass_is_served_as_its_parent(kinds, tmp_path):
    class Mine(kinds.CSVLogger):
        pass

    SCORES.log(Mine(tmp_path, prefix="run"), name="a/b c")
    folder = tmp_path / "lightning_logs" / "version_0"
    assert (folder / "influence_a_b_c_scores.csv").is_file()
    assert rows(folder / "metrics.csv")[0]["run-influence/a/b c/top_proponent_max"] == "3.0"


def test_a_picture_that_cannot_be_drawn_costs_a_warning_only():
    logger = Bare()
    with pytest.warns(UserWarning, match=r"No figure was logged \(ValueError: Expected an image .* Pass `render=`"):
        SCORES.log(logger, train=[torch.zeros(2, 3, 4, 5)] * 8, queries=[torch.zeros(2, 3, 4, 5)] * 9)
    assert logger.got["saved"]


def test_without_matplotlib_everything_else_is_logged(monkeypatch, caplog, tmp_path, kinds):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with caplog.at_level(logging.WARNING, "lightning_influence.loggers"):
        SELF.log(kinds.CSVLogger(tmp_path))
    assert 'pip install "lightning-influence[plot]"' in caplog.text
    assert {path.suffix for path in tmp_path.rglob("influence_*")} == {".csv", ".txt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_histogram_counts_as_numpy_does(dtype):
    values = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    counted = Histogram.of(values.split(2), bins=7)
    counts, edges = np.histogram(values.double().numpy(), bins=7)
    assert counted.counts == counts.tolist()
    assert counted.edges == pytest.approx(edges.tolist())
    assert counted.total == pytest.approx(float(values.double().sum()))
    assert counted.squares == pytest.approx(float(values.double().square().sum()))


@pytest.mark.parametrize(
    ("values", "edges", "counts"),
    [
        ([2.0, 2.0], [1.5, 2.0, 2.5], [0, 2]),
        ([float("nan"), 0.0, 1.0, float("inf")], [0.0, 0.5, 1.0], [1, 1]),
        ([float("nan")], [0.0, 0.5, 1.0], [0, 0]),
    ],
    ids=["equal", "not finite among them", "nothing finite"],
)
def test_a_histogram_of_odd_numbers(values, edges, counts):
    found = Histogram.of([torch.tensor(values)], bins=2)
    assert (found.edges, found.counts) == (edges, counts)


def test_numbers_of_an_evaluation_are_logged_beside():
    logger = Bare()
    SCORES.log(logger, metrics={"lds": torch.tensor(0.5), "opponents_share": 9.0})
    assert logger.got["influence/TracInCP/lds"] == 0.5
    assert logger.got["influence/TracInCP/opponents_share"] == pytest.approx(1 / 6)  # ours is not to be overwritten
    with pytest.raises(TypeError, match=r"`metrics` to map names to single numbers, got \{'lds': 'high'\}"):
        SCORES.log(None, metrics={"lds": "high"})


def test_a_long_table_is_shortened_for_a_page():
    text = tensorboard.markdown((["a"], [["x|y\nz"]] * 250))
    assert text.splitlines()[2] == r"| x\|y z |"
    assert text.endswith("50 more rows: `scores.to_arrow(k)` has them all.")
    assert len(text.splitlines()) == 2 + 200 + 2


def test_what_looks_like_markup_is_shown_as_it_is():
    text = tensorboard.markdown((["train_id"], [["**b** <i>x</i> & `c` [a](b) # _d_ e_f ~g~"]]))
    assert text.splitlines()[0] == "| train_id |"
    shown = r"| \*\*b\*\* &lt;i&gt;x&lt;/i&gt; &amp; \`c\` \[a\](b) \# \_d\_ e_f \~g\~ |"
    assert text.splitlines()[2] == shown


def test_only_the_strongest_kept_is_logged_without_a_share():
    logger = Bare()
    Scores(None, (SCORES.proponents(1), SCORES.opponents(1)), SCORES.train_ids, SCORES.query_ids, method="TracIn").log(
        logger
    )
    assert set(logger.got) == {"influence/TracIn/top_proponent_mean", "influence/TracIn/top_proponent_max", "saved"}
