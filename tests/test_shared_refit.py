"""Models that several real processes retrain together are those of one, and what one refuses all refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import seeded
from gloo_refit import answers
from gloo_score import Digits

from lightning_influence import Trajectory
from lightning_influence.processes import Processes
from lightning_influence.refit.store import ModelStore, TrainedModel

PROGRAM = Path(__file__).parent / "gloo_refit.py"


def run(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(PROGRAM), str(folder), *map(str, arguments)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"refit-{rank}.pt") for rank in range(arguments[0])]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_retrain_as_one(tmp_path, count):
    ranks = run(tmp_path, count)
    one = answers(seeded(Digits), Trajectory.load(tmp_path / "influence"), tmp_path / "alone")
    for question, expected in one.items():
        assert not isinstance(expected, str), (question, expected)
        for found in ranks:
            torch.testing.assert_close(found[question], expected, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.slow
def test_what_one_process_refuses_all_refuse(tmp_path):
    """The disk of one is full; Trainers of several processes would mix models."""
    for found in run(tmp_path, 2, "refused"):
        assert found["fixed", "leave one out"] == "OSError: this disk is full"
        assert "return a Trainer of one process, got 2" in found["independent", "leave one out"]


def test_processes_write_files_of_their_own(tmp_path):
    def model(first):
        return TrainedModel(torch.arange(4) >= first, 0, 0.0, {"w": torch.full((2,), float(first))})

    layout = {"w": ("float32", [2])}
    stores = [ModelStore(tmp_path, {}, layout, Processes(rank, 3)) for rank in range(3)]
    for first, store in enumerate([*stores, stores[1]]):
        store.add([model(first)])
    everyone = ModelStore(tmp_path, {}, layout)
    keys = [model(first).key for first in range(4)]
    assert [float(weights["w"][0]) for weights in everyone.weights(keys)] == [0, 1, 2, 3]
    with stores[1].writing():  # it picks up the others'
        assert len(stores[1]) == 4
