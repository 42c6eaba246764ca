"""Files of every format that was released are read, with the numbers that were written; see `fixtures/make.py`."""

import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from lightning_influence import LeaveOneOut, Refit, Scores, SelfScores, TracInCP, Trajectory
from lightning_influence.cli import main
from lightning_influence.replay.random_states import put_back
from lightning_influence.replay.steps import captured
from lightning_influence.trajectory import files

FIXTURES = Path(__file__).parent / "fixtures"
FORMATS = sorted(path.name for path in FIXTURES.glob("format-*"))
spec = importlib.util.spec_from_file_location("make", FIXTURES / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.fixture(params=FORMATS)
def folder(request, tmp_path):
    """A copy, since questions add files to it."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


def test_there_are_files_of_every_format():
    assert FORMATS == ["format-1", "format-2"]


def test_everything_is_intact_and_shown(folder, capsys):
    for path in (folder / "runs", folder / "bank", folder / "top_k.arrow", folder / "self.arrow"):
        assert main(["verify", str(path)]) == 0
        assert "DAMAGED" not in capsys.readouterr().out
    for path in (folder / "runs", folder / "TracInCP.arrow", folder / "self.arrow"):
        assert main(["show", str(path)]) == 0


def test_scores_are_read_and_computed_again(folder):
    expected = {name: torch.tensor(v, dtype=torch.float64) for name, v in written(folder).items()}
    ask = make.attributor(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.*")}
    for name, method in make.METHODS.items():
        torch.testing.assert_close(Scores.load(folder / f"{name}.arrow").values, expected[name], rtol=0, atol=0)
        found = ask.score(method, make.data(3, 1))
        torch.testing.assert_close(found.values, expected[name], rtol=1e-9, atol=1e-12)
        assert not any("computed again" in note for note in found.notes), name
    # Prepared curvature, features and hypergradients were read, not written again.
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert Scores.load(folder / "top_k.arrow").top_k == 2
    own = SelfScores.load(folder / "self.arrow").values
    torch.testing.assert_close(ask.self_influence(TracInCP()).values, own, rtol=1e-9, atol=1e-12)


def test_the_run_is_whole(folder):
    trajectory = Trajectory.load(folder / "runs")
    assert trajectory.finished
    assert trajectory.has_batch_order
    assert [checkpoint.step for checkpoint in trajectory.checkpoints] == [0, 3, 6]


def test_retrained_models_are_read(folder):
    files = sorted((folder / "bank").iterdir())
    ask = make.attributor(folder, refit=Refit(dirpath=str(folder / "bank")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that models are trained again
        found = ask.score(LeaveOneOut(), make.data(3, 1))
    torch.testing.assert_close(found.values.tolist(), written(folder)["LeaveOneOut"], rtol=1e-9, atol=1e-12)
    assert [path for path in sorted((folder / "bank").iterdir()) if path.name != ".lock"] == files


def written(folder):
    return json.loads((folder / "values.json").read_text())


def test_states_of_generators_that_an_earlier_version_wrote_are_read():
    before = pa.list_(pa.struct([pa.field(name, pa.binary()) for name in ("torch", "cuda", "python", "numpy")]))
    states = [[{"torch": b"t", "cuda": b"c", "python": None, "numpy": None}, None], None]
    table = files.completed(pa.table({"step": [1, 2], "rng": pa.array(states, before)}))
    assert table.schema.field("rng").type == files.STEPS.field("rng").type
    assert captured(table["rng"].to_pylist()[0][0]) == {"torch": b"t", "accelerator": b"cuda:c"}
    assert table["rng"].to_pylist()[0][1] is table["rng"].to_pylist()[1] is None
    assert table["read_rng"].to_pylist() == [None, None]


def test_a_generator_of_another_kind_of_device_is_left_alone():
    before = torch.get_rng_state()
    put_back({"accelerator": b"cuda:" + bytes(16)}, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
