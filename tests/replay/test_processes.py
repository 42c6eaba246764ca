"""A fit in two real processes has the scores of the same fit in one, and each process's random states are its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import QUIET, Indexed, Net, seeded
from oracles import assert_scores
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader

from lightning_influence import Attributor, HyDRA, Influence, TracIn, TracInCP, Trajectory

N = 23
METHODS = {
    "HyDRA": HyDRA(checks=0),
    "fast": HyDRA(checks=0, hessian=False),
    "TracIn": TracIn(),
    "TracInCP": TracInCP(),
}


def in_two(folder, *arguments):
    """The folder of the run of a fit in two processes, and what each of them was given."""
    program = Path(__file__).parents[1] / "gloo_fit.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(program), str(folder), "ddp", "0", "double", "momentum", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "influence", [torch.load(folder / f"seen-{rank}.pt")[0] for rank in (0, 1)]


def trainer(*callbacks):
    return Trainer(**QUIET | {"max_epochs": 2, "precision": "64-true", "callbacks": list(callbacks)})


def scores(module, run, method):
    attributor = Attributor(module, Indexed(N), Trajectory.load(run), trainer())
    return attributor.score(method, Indexed(5))


class Given(torch.utils.data.Sampler):
    """Batches of given examples, epoch after epoch."""

    def __init__(self, epochs):
        self.epochs = iter(epochs)

    def __iter__(self):
        return iter(next(self.epochs))

    def __len__(self):
        return 3


@pytest.mark.slow
def test_two_processes_have_the_scores_of_one_with_their_batches_joined(tmp_path):
    """I21."""
    run, seen = in_two(tmp_path)
    joined = [mine + other for mine, other in zip(*seen, strict=True)]
    module = seeded(Net, momentum=0.9)
    loader = DataLoader(Indexed(N), batch_sampler=Given([joined[:3], joined[3:]]))
    trainer(Influence(dirpath=tmp_path / "one")).fit(module, loader)
    assert module.seen == joined
    for method in METHODS.values():
        two, one = (scores(module, where, method) for where in (run, tmp_path / "one"))
        assert_scores(two.values, one.values, 1e-10)
        assert two.figures.get("drift", 0.0) < 1e-12


@pytest.mark.slow
def test_what_each_process_drew_is_repeated(tmp_path):
    run, _ = in_two(tmp_path, "dropout")
    assert scores(seeded(Net, dropout=0.5).double(), run, METHODS["HyDRA"]).figures["drift"] < 1e-12
