"""Two real processes: every rank's examples are known, and rank 0 writes the checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import Indexed, Net, recorded
from torch.utils.data import Subset

from lightning_influence import Attributor, GradientDot
from lightning_influence.trajectory import Trajectory


def run(folder, *arguments, check=True):
    folder.mkdir(exist_ok=True)
    program = Path(__file__).parents[1] / "gloo_fit.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(program), str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def assert_recorded(tmp_path, strategy, workers):
    """The record is the union of what the ranks saw, and training is that of a fit without the callback."""
    if strategy == "ddp":
        run(tmp_path, strategy, workers, "both")
    else:
        run(tmp_path / "with", strategy, workers)
        run(tmp_path / "without", strategy, workers, "plain")
    seen = []
    for rank in (0, 1):
        watched, plain = (torch.load(tmp_path / name / f"seen-{rank}.pt") for name in ("with", "without"))
        assert watched[0] == plain[0]
        assert torch.equal(watched[1], plain[1])
        seen.append(watched[0])
    trajectory = Trajectory.load(tmp_path / "with" / "influence")
    assert recorded(trajectory) == [ids for pair in zip(*seen, strict=True) for ids in pair]
    assert [c.step for c in trajectory.checkpoints] == [0, 3, 6]
    assert set(trajectory.steps["divisor"].to_pylist()) == {2}
    assert torch.equal(trajectory.checkpoints[-1].load().parameters["layer.weight"], watched[1])
    # 24 draws an epoch for 23 examples: the sampler pads, and the padding counts
    assert sorted(len(ids) for ids in recorded(trajectory)) == [4] * 12
    assert trajectory.exposure(1, "mean", 23).sum() == pytest.approx(0.1 * 3)
    return trajectory


@pytest.mark.slow
def test_ddp_in_two_processes(tmp_path):
    trajectory = assert_recorded(tmp_path, "ddp", 0)
    assert trajectory.finished
    assert trajectory.dataset_size == 23
    assert trajectory.fit_data.confirmed
    assert [len(batch.ids) for batch in trajectory.fit_data.batches] == [4, 4]
    assert trajectory.fit_data.losses is None  # a step may wait for the other processes
    Attributor(Net(), Indexed(23), trajectory).score(GradientDot(), Indexed(2))
    with pytest.raises(ValueError, match="Expected `train` to give the batches that were trained on"):
        Attributor(Net(), Subset(Indexed(23), range(22, -1, -1)), trajectory).losses()


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "workers"), [("ddp", 2), ("ddp_spawn", 0), ("ddp_fork", 0)])
def test_other_ways_to_start_processes(strategy, workers, tmp_path):
    assert_recorded(tmp_path, strategy, workers)


@pytest.mark.slow
def test_spawn_strategies_need_a_folder(tmp_path):
    done = run(tmp_path / "spawn", "ddp_spawn", 0, "nowhere")
    assert "Expected `Influence(dirpath=...)` with 'DDPStrategy', got `dirpath=None`" in done.stderr
