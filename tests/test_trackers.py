"""A fit with every tracker at once, each read back: W&B's run file, MLflow by its client, Comet's archive."""

import csv
import importlib
import json
import math
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [
    pytest.mark.slow,
    # sockets that the trackers leave to the collector
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
wandb = pytest.importorskip("wandb")
mlflow = pytest.importorskip("mlflow")
comet_ml = pytest.importorskip("comet_ml")
pytest.importorskip("matplotlib")

from lightning_influence import Influence, Scores, SelfScores, TracInCP

PACKAGES = [name for name in ("pytorch_lightning", "lightning.pytorch") if importlib.util.find_spec(name.split(".")[0])]
QUERIES, TRAIN, STEPS = 4, 12, 6


def model_of(pl):
    class Regression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = torch.nn.functional.mse_loss(self.layer(x)[:, 0], y)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Regression()


@pytest.fixture(scope="module", params=PACKAGES)
def fit(request, tmp_path_factory):
    """A fit with all loggers; what is expected of them, and where they wrote."""
    pl, folder = importlib.import_module(request.param), tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.chdir(folder)
        loggers = importlib.import_module(f"{request.param}.loggers")
        board = loggers.WandbLogger(save_dir=folder, offline=True)
        flow = loggers.MLFlowLogger("digits", tracking_uri=(folder / "mlruns").as_uri())
        # `CometLogger(online=False)` makes an experiment that is disabled: a real offline one takes its place
        comet = loggers.CometLogger(online=False, api_key="none")
        comet._experiment = comet_ml.OfflineExperiment(offline_directory=str(folder / "comet"))
        torch.manual_seed(0)
        train = TensorDataset(torch.randn(TRAIN, 3), torch.randn(TRAIN))
        queries = TensorDataset(torch.randn(QUERIES, 3), torch.randn(QUERIES))
        influence = Influence([TracInCP()], queries=queries, self_influence=True, dirpath=folder / "influence")
        trainer = pl.Trainer(
            max_epochs=2, callbacks=[influence], logger=[board, flow, comet, loggers.CSVLogger(folder)],
            accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            log_every_n_steps=1,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the trackers, about themselves
            trainer.fit(model_of(pl), DataLoader(train, batch_size=4))
            scores = influence.scores["TracInCP"]
            # once more after the fit, as a user may, with a number of an evaluation
            scores.log(trainer.loggers, step=STEPS, name="again", metrics={"lds": torch.tensor(0.75)})
            scores.log(trainer.loggers, step=STEPS, name="again")
        run_file = next(Path(board.experiment.dir).parent.glob("*.wandb"))
        media = Path(board.experiment.dir)
        wandb.finish()
        comet.experiment.end()
        yield {
            "scores": scores, "self": influence.self_scores["TracInCP"], "folder": folder, "flow": flow,
            "run_file": run_file, "media": media,
        }  # fmt: skip


def expected_scalars(scores, itself):
    best = scores.values.max(dim=1).values.double()
    return {
        "top_proponent_mean": float(best.mean()),
        "top_proponent_max": float(best.max()),
        "opponents_share": float((scores.values < 0).double().mean()),
        "self_mean": float(itself.values.double().mean()),
        "self_top": float(itself.values.max()),
    }


def expected_rows(scores):
    """query, train, score, rank, side: five proponents and five opponents of twelve, by a plain sort."""
    rows = []
    for query, row in enumerate(scores.values.tolist()):
        ranked = sorted(range(TRAIN), key=lambda i: (-row[i], i))
        for rank in [*range(5), *range(TRAIN - 5, TRAIN)]:
            i = ranked[rank]
            rows.append([query, i, row[i], rank + 1, "proponent" if row[i] > 0 else "opponent"])
    return rows


def check_table(columns, rows, scores):
    assert list(columns[:5]) == ["query_id", "train_id", "score", "rank", "side"]
    assert {"query_target", "query_loss", "train_target", "train_loss"} <= set(columns[5:])
    rows = [list(row)[:5] for row in rows]
    expected = expected_rows(scores)
    assert [[r[0], r[1], r[3], r[4]] for r in rows] == [[r[0], r[1], r[3], r[4]] for r in expected]
    assert [r[2] for r in rows] == pytest.approx([r[2] for r in expected], rel=1e-6)


# W&B: the offline run's own file, a log of protobuf records in blocks of 32 KiB


def records(path):
    """The records of a run file: after 7 bytes of header pieces of (crc32, length, kind), none across two blocks."""
    data, at, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece, at = data[at + 7 : at + 7 + length], at + 7 + length
        record = piece if kind in (1, 2) else record + piece  # whole, first, middle, last
        if kind in (1, 4):
            yield record


def history(run_file):
    """The rows of an offline run's history, as one dict: later values replace earlier ones."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for data in records(run_file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                place = found
                for name in outer:
                    place = place.setdefault(name, {})
                place[last] = json.loads(item.value_json)
    return found


def test_wandb_run_file_holds_scalars_table_histogram_and_figures(fit):
    found = history(fit["run_file"])
    for name, value in expected_scalars(fit["scores"], fit["self"]).items():
        assert found[f"influence/TracInCP/{name}"] == pytest.approx(value, rel=1e-6)
    assert found["influence/again/lds"] == 0.75
    assert found["trainer/global_step"] == STEPS
    assert "train_loss" in found
    table = found["influence/TracInCP/scores_table"]
    assert (table["_type"], table["nrows"]) == ("table-file", 10 * QUERIES)
    content = json.loads((fit["media"] / table["path"]).read_text())
    check_table(content["columns"], content["data"], fit["scores"])
    most = json.loads((fit["media"] / found["influence/TracInCP/self_influence_table"]["path"]).read_text())
    assert [row[0] for row in most["data"]] == fit["self"].values.argsort(descending=True).tolist()
    for what, values in (("scores", fit["scores"].values), ("self_influence", fit["self"].values)):
        bins = found[f"influence/TracInCP/{what}_histogram"]
        assert bins["_type"] == "histogram"
        assert sum(bins["values"]) == values.numel()
        assert (bins["bins"][0], bins["bins"][-1]) == pytest.approx((float(values.min()), float(values.max())))
        for low, high, count in zip(bins["bins"][:-1], bins["bins"][1:], bins["values"], strict=True):
            inside = int(((values.double() >= low - 1e-9) & (values.double() <= high + 1e-9)).sum())
            assert count <= inside
    for what in ("explanation_figure", "self_influence_figure"):
        image = found[f"influence/TracInCP/{what}"]
        assert image["_type"] == "image-file"
        assert (fit["media"] / image["path"]).read_bytes().startswith(b"\x89PNG")
    about = (fit["media"] / found["influence/TracInCP/about"]["path"]).read_text()
    assert "scores of 4 queries by 12 training examples" in about


# MLflow: a local store, read by its own client


def test_mlflow_store_holds_metrics_tables_and_figures(fit):
    client = mlflow.MlflowClient((fit["folder"] / "mlruns").as_uri())
    run = client.get_run(fit["flow"].run_id)
    for name, value in expected_scalars(fit["scores"], fit["self"]).items():
        assert run.data.metrics[f"influence/TracInCP/{name}"] == pytest.approx(value, rel=1e-6)
    (point,) = client.get_metric_history(run.info.run_id, "influence/again/lds")
    assert (point.value, point.step) == (0.75, STEPS)
    there = {file.path for file in client.list_artifacts(run.info.run_id, "influence/TracInCP")}
    assert there == {
        f"influence/TracInCP/{file}"
        for file in (
            "scores.json", "scores_histogram.json", "explanation.png", "about.txt",
            "self_influence.json", "self_influence_histogram.json", "self_influence.png", "self_influence_highest.png",
            "about_self_influence.txt",
        )
    }  # fmt: skip
    listed = json.loads(run.data.tags["mlflow.loggedArtifacts"])  # what its page offers as tables
    assert {"path": "influence/TracInCP/scores.json", "type": "table"} in listed
    table = client.load_table(fit["flow"].experiment_id, "influence/TracInCP/scores.json", [run.info.run_id])
    check_table(table.columns, table.values.tolist(), fit["scores"])
    # logged twice under this name: replaced, not doubled
    again = client.load_table(fit["flow"].experiment_id, "influence/again/scores.json", [run.info.run_id])
    check_table(again.columns, again.values.tolist(), fit["scores"])
    bins = client.load_table(fit["flow"].experiment_id, "influence/TracInCP/self_influence_histogram.json")
    assert bins["count"].sum() == TRAIN
    image = client.download_artifacts(run.info.run_id, "influence/TracInCP/explanation.png", str(fit["folder"]))
    assert Path(image).read_bytes().startswith(b"\x89PNG")


def test_mlflow_without_pandas_still_has_the_tables(fit, monkeypatch):
    client = mlflow.MlflowClient((fit["folder"] / "mlruns").as_uri())
    monkeypatch.setattr(mlflow.MlflowClient, "log_table", _no_pandas)
    fit["scores"].log(fit["flow"], name="bare")
    path = client.download_artifacts(fit["flow"].run_id, "influence/bare/scores.json", str(fit["folder"]))
    content = json.loads(Path(path).read_text())
    check_table(content["columns"], content["data"], fit["scores"])


def _no_pandas(*args, **kwargs):
    raise ImportError("No module named 'pandas'")


# Comet: the archive of an offline experiment


def test_comet_archive_holds_metrics_table_histogram_and_figures(fit):
    (path,) = (fit["folder"] / "comet").glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        metrics = {
            m["payload"]["metric"]["metricName"]: m["payload"]["metric"] for m in messages if "metric" in m["payload"]
        }
        for name, value in expected_scalars(fit["scores"], fit["self"]).items():
            assert metrics[f"influence/TracInCP/{name}"]["metricValue"] == pytest.approx(value, rel=1e-6)
            assert metrics[f"influence/TracInCP/{name}"]["step"] == STEPS
        assert metrics["influence/again/lds"]["metricValue"] == 0.75
        files = {}
        for message in messages:
            more = message["payload"].get("additional_params") or {}
            if name := more.get("fileName") or more.get("figName") or more.get("assetId"):
                files[message["payload"]["upload_type"], name] = archive.read(message["payload"]["file_path"])
        columns, *rows = csv.reader(files["asset", "influence/TracInCP/scores.csv"].decode().splitlines())
        rows = [[int(r[0]), int(r[1]), float(r[2]), int(r[3]), r[4]] for r in rows]
        check_table(columns, rows, fit["scores"])
        bins = json.loads(files["histogram3d", "influence/TracInCP/self_influence"])
        assert sum(count for _, count in bins["index_values"] if not math.isnan(count)) == TRAIN
        assert b"<svg" in files["visualization", "influence/TracInCP/explanation"]
        texts = [content for (kind, _), content in files.items() if kind == "text-sample"]
        assert any(b"4 queries by 12 training examples" in text for text in texts)


def test_what_was_logged_is_what_was_saved(fit):
    folder = fit["folder"] / "influence" / "run-0" / "scores"
    assert torch.equal(Scores.load(folder / "TracInCP.arrow").values, fit["scores"].values)
    assert torch.equal(SelfScores.load(folder / "TracInCP.self.arrow").values, fit["self"].values)
