"""Fits whose processes share the weights are recorded whole, and refused where they are to be scored."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import seeded
from gloo_fsdp import LIMIT, N, Sharded, data
from oracles import assert_scores

from lightning_influence import Attributor, TracInCP, Trajectory
from lightning_influence.capture.places import CannotRecord, check_strategy
from lightning_influence.capture.steps import _keeps_gradients

PROGRAM = Path(__file__).parent / "gloo_fsdp.py"


def run(folder, *arguments):
    """What both processes have at the end of the fit: whole weights and optimizer state."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(PROGRAM), str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"whole-{rank}.pt") for rank in (0, 1)], done.stderr


def gradients(module, examples):
    """By autograd, [example, entry]."""
    rows, trained = [], [p for p in module.parameters() if p.requires_grad]
    for x, y in examples:
        loss = torch.nn.functional.cross_entropy(module(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    return torch.stack(rows)


def assert_clipped(trajectory):
    """The coefficients of the steps from recorded weights are those of the norm over both processes."""
    module, starts = seeded(Sharded), {checkpoint.step + 1: checkpoint for checkpoint in trajectory.checkpoints}
    found = {row["step"]: row for row in trajectory.steps.to_pylist() if row["step"] in starts}
    assert len(found) == 3
    for step, row in found.items():
        module.load_state_dict(starts[step].load().parameters, strict=False)
        mean = torch.stack([gradients(module, [data(N, 1)[i] for i in ids]).mean(0) for ids in row["ids"]]).mean(0)
        assert row["clip"] == pytest.approx(LIMIT / (float(mean.norm()) + 1e-6), rel=1e-10)
        assert row["clip"] < 1


def by_hand(trajectory):
    """TracInCP of one query after another, by autograd on modules of the recorded weights."""
    module, total = seeded(Sharded), 0
    exposed = torch.zeros(len(trajectory.checkpoints), N, dtype=torch.float64)
    ends = [checkpoint.step for checkpoint in trajectory.checkpoints]
    for row in trajectory.steps.to_pylist():
        for micro in row["ids"]:
            for i in micro:
                position = next(k for k, end in enumerate(ends) if row["step"] <= end)
                exposed[position, i] += row["clip"] * row["lr"][0] / (row["divisor"] * len(micro)) / (1 - 0.5)
    for k, checkpoint in enumerate(trajectory.checkpoints):
        module.load_state_dict(checkpoint.load().parameters, strict=False)
        total = total + gradients(module, data(5, 2)) @ gradients(module, data(N, 1)).T * exposed[k]
    return total


@pytest.mark.slow
@pytest.mark.parametrize("words", [("clip",), ("adam", "steps")])
def test_the_whole_state_is_recorded_and_training_is_the_same(tmp_path, words):
    (first, second), errors = run(tmp_path / "with", *words)
    plain, _ = run(tmp_path / "plain", "plain", *words)
    for watched, unwatched in zip((first, second), plain, strict=True):
        for one, other in zip(watched[0].items(), unwatched[0].items(), strict=True):
            assert one[0] == other[0]
            assert torch.equal(one[1], other[1])
    trajectory = Trajectory.load(tmp_path / "with" / "influence")
    assert trajectory.finished
    assert [c.step for c in trajectory.checkpoints] == ([0, 2, 4, 6, 8, 9] if "steps" in words else [0, 3, 6, 9])
    last, (weights, state) = trajectory.checkpoints[-1].load(), first
    assert last.parameters.keys() == dict(seeded(Sharded).named_parameters()).keys()
    assert all(torch.equal(value, weights[name]) for name, value in last.parameters.items())
    assert last.optimizer.keys() == state.keys()
    for name, values in state.items():
        assert all(torch.equal(last.optimizer[name][key], torch.as_tensor(v)) for key, v in values.items())
    assert last.buffers["scale"] == 0.9
    assert "whose weights several processes share" in errors
    scores = Attributor(seeded(Sharded), data(N, 1), trajectory).score(TracInCP(), data(5, 2))
    if "clip" in words:
        assert not any("as shards" in note for note in trajectory.notes)
        assert_clipped(trajectory)
        assert_scores(scores.values, by_hand(trajectory), 1e-10)


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_recording_of_both(tmp_path):
    run(tmp_path, "fails")
    for rank in (0, 1):
        reasons, _ = torch.load(tmp_path / f"reasons-{rank}.pt")
        assert "no more disk" in reasons["TracInCP"]
    trajectory = Trajectory.load(tmp_path / "influence")
    assert "no more disk" in trajectory.broken


class ModelParallelStrategy:
    launcher, world_size = None, 2

    def __init__(self, copies=2, automatic=True):
        self.distributed_sampler_kwargs = {"num_replicas": copies}
        self.lightning_module = type("Module", (), {"automatic_optimization": automatic})


class FSDPStrategy(ModelParallelStrategy):
    pass


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (ModelParallelStrategy(copies=1), "tensor_parallel_size=1"),
        (ModelParallelStrategy(automatic=False), "Expected automatic optimization"),
        (FSDPStrategy(), "`ModelParallelStrategy` with `fully_shard`"),
    ],
)
def test_what_is_not_recorded_is_refused_by_name(strategy, text):
    with pytest.raises(CannotRecord, match=text):
        check_strategy(strategy, None)
    check_strategy(ModelParallelStrategy(), None)


def test_only_steps_that_keep_gradients_tell_how_much_shards_were_clipped():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    assert _keeps_gradients(torch.optim.SGD(weight, 0.1, momentum=0.9))
    assert _keeps_gradients(torch.optim.AdamW(weight))
    assert not _keeps_gradients(torch.optim.SGD(weight, 0.1, momentum=0.9, nesterov=True))
    assert not _keeps_gradients(torch.optim.Adagrad(weight))
