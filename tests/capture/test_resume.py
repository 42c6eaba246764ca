"""Resumed fits link to the run before; branches lose nothing; what a kill leaves behind is whole."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import Indexed, Net, by_epoch, fit, loader, recorded, seeded
from pytorch_lightning import Callback
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from victim import begun, finishes, killed

from lightning_influence.callback.influence import Influence
from lightning_influence.trajectory import Trajectory


class SaveAt(Callback):
    def __init__(self, step, path, stop=True):
        self.step, self.path, self.stop = step, path, stop

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = self.stop


def assert_same(one, other):
    """Two trajectories are of one and the same training."""
    assert [(c.step, c.epoch) for c in one.checkpoints] == [(c.step, c.epoch) for c in other.checkpoints]
    columns = ["step", "epoch", "ids", "lr", "divisor"]
    assert one.steps.select(columns).to_pylist() == other.steps.select(columns).to_pylist()
    for checkpoints in zip(one.checkpoints, other.checkpoints, strict=True):
        mine, theirs = (checkpoint.load() for checkpoint in checkpoints)
        assert all(torch.equal(value, theirs.parameters[name]) for name, value in mine.parameters.items())
    for k in range(len(one.checkpoints)):
        torch.testing.assert_close(one.exposure(k, "mean", 23), other.exposure(k, "mean", 23))


def test_a_fit_resumed_at_the_end_of_an_epoch_equals_an_undisturbed_one(tmp_path):
    whole, first, second = (Influence(dirpath=tmp_path / name) for name in ("whole", "parts", "parts"))
    fit(seeded(Net, momentum=0.9, schedule="epoch"), by_epoch(), whole, max_epochs=4)
    trainer = fit(
        seeded(Net, momentum=0.9, schedule="epoch"), by_epoch(), first, SaveAt(12, tmp_path / "x.ckpt", False)
    )
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    module = seeded(Net, momentum=0.9, schedule="epoch")
    fit(module, by_epoch(), second, max_epochs=4, ckpt_path=tmp_path / "x.ckpt")
    assert second.run_dir.name == "run-1"
    assert_same(second.trajectory, whole.trajectory)
    assert second.trajectory.fit_seconds > 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:'set_vital' is deprecated")
def test_indices_are_right_after_resuming_in_mid_epoch(kind, workers, tmp_path):
    def make():
        return kind(Indexed(), 4, shuffle=True, num_workers=workers)

    first, second, path = Influence(dirpath=tmp_path), Influence(dirpath=tmp_path), tmp_path / "mid.ckpt"
    before, after, plain = seeded(Net), seeded(Net), seeded(Net)
    fit(before, make(), first, SaveAt(3, path))
    fit(after, make(), second, ckpt_path=path)
    fit(plain, make(), ckpt_path=path)
    assert recorded(first.trajectory) == before.seen
    assert recorded(second.trajectory) == before.seen[:3] + after.seen
    assert plain.seen == after.seen
    assert torch.equal(plain.layer.weight, after.layer.weight)
    assert [c.step for c in second.trajectory.checkpoints] == [0, *([3] if len(before.seen) == 3 else []), 6, 12]


def test_a_resume_from_an_older_checkpoint_is_a_branch(tmp_path):
    trunk, branch = Influence(dirpath=tmp_path), Influence(dirpath=tmp_path)
    before, after = seeded(Net), seeded(Net)
    fit(before, loader(), trunk, SaveAt(6, tmp_path / "old.ckpt", stop=False), max_epochs=3)
    fit(after, loader(), branch, max_epochs=2, ckpt_path=tmp_path / "old.ckpt")
    assert recorded(Trajectory.load(tmp_path / "run-0")) == before.seen
    assert recorded(Trajectory.load(tmp_path)) == before.seen[:6] + after.seen
    assert [c.step for c in Trajectory.load(tmp_path).checkpoints] == [0, 6, 12]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # another dirpath is another state key
def test_a_parent_that_is_gone_is_said(tmp_path):
    import shutil

    first, second = Influence(dirpath=tmp_path / "a"), Influence(dirpath=tmp_path / "b")
    fit(seeded(Net), loader(), first, SaveAt(6, tmp_path / "x.ckpt"), max_epochs=2)
    fit(seeded(Net), loader(), second, ckpt_path=tmp_path / "x.ckpt")
    assert [c.step for c in second.trajectory.checkpoints] == [0, 6, 12]
    shutil.rmtree(tmp_path / "a")
    trajectory = second.trajectory
    assert [c.step for c in trajectory.checkpoints] == [6, 12]
    assert any("resumed run-0 at step 6" in note for note in trajectory.notes)
    assert not trajectory.exposure(0, "mean", 23).any()


def test_moved_runs_find_each_other(tmp_path):
    first, second = Influence(dirpath=tmp_path / "a"), Influence(dirpath=tmp_path / "a")
    fit(seeded(Net), loader(), first, SaveAt(6, tmp_path / "x.ckpt"))
    fit(seeded(Net), loader(), second, ckpt_path=tmp_path / "x.ckpt")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert [c.step for c in Trajectory.load(tmp_path / "moved").checkpoints] == [0, 6, 12]


def test_resuming_from_a_fit_without_the_callback_is_said(tmp_path):
    fit(seeded(Net), loader(), SaveAt(6, tmp_path / "x.ckpt"))
    influence = Influence(dirpath=tmp_path)
    with pytest.warns(UserWarning, match="without the state of this `Influence`"):
        fit(seeded(Net), loader(), influence, ckpt_path=tmp_path / "x.ckpt")
    assert [c.step for c in influence.trajectory.checkpoints] == [6, 12]


def test_our_state_is_builtins_only(tmp_path):
    fit(seeded(Net), loader(), Influence(dirpath=tmp_path), SaveAt(6, tmp_path / "x.ckpt"))
    states = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in states.items() if key.startswith("Influence"))
    assert {type(value) for value in state.values()} <= {str, int}


def test_two_fits_at_once_on_one_folder_are_two_runs(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from lightning_influence.capture.store import claim_run

    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: claim_run(tmp_path), range(40)))
    assert sorted(int(run.name[4:]) for run in runs) == list(range(40))


@pytest.mark.slow
def test_two_processes_at_once_on_one_folder_do_not_meet(tmp_path):
    both = [begun(tmp_path, "alone")[0] for _ in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    one, other = (Trajectory.load(tmp_path / "influence" / run) for run in ("run-0", "run-1"))
    assert one.finished
    assert_same(one, other)


# ---- accidents, in processes of their own ----

PROGRAM = Path(__file__).parents[1] / "victim.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def victim(tmp_path, *arguments):
    """Start the fit that accidents happen to."""
    command = [sys.executable, str(PROGRAM), str(tmp_path), *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def finish(process):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "finished" in output
    return output


def readable(folder):
    """What a killed fit left is whole."""
    for run in (folder / "influence").glob("run-*"):
        if (run / "manifest.json").exists():
            trajectory = Trajectory.load(run)
            assert all(set(checkpoint.load().parameters) for checkpoint in trajectory.checkpoints)
            steps = trajectory.steps["step"].to_pylist()
            assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_twenty_kills_leave_what_was_whole(tmp_path):
    chance = random.Random(0)
    finishes(tmp_path / "whole")
    whole = Trajectory.load(tmp_path / "whole" / "influence")
    for k in range(5):
        killed(tmp_path / str(k), [chance.uniform(0, 0.25) for _ in range(4)], readable)
        assert_same(Trajectory.load(tmp_path / str(k) / "influence"), whole)


@pytest.mark.slow
def test_a_full_disk_ends_the_recording_and_not_the_fit(tmp_path):
    output = finish(victim(tmp_path, "full"))
    assert "could not write" in output
    assert "The fit goes on" in output
    trajectory = Trajectory.load(tmp_path / "influence")
    assert all(checkpoint.load() for checkpoint in trajectory.checkpoints)
    assert not trajectory.finished
    assert trajectory.checkpoints[-1].step < 60


@pytest.mark.slow
def test_a_full_file_system_ends_the_recording_and_not_the_fit(tmp_path):
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    # A namespace of its own, where anybody may mount: what was mounted is gone with it, hence the copy.
    script = 'mount -t tmpfs -o size=128k tmpfs "$1" && "$2" "$3" "$1" alone && cp -r "$1" "$4"'
    program = [sys.executable, str(PROGRAM), str(kept)]
    command = ["unshare", "-rm", "sh", "-ec", script, "sh", str(small), *program]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert "No space left on device" in finish(process)
    trajectory = Trajectory.load(kept / "influence")
    assert not trajectory.finished
    assert 0 < trajectory.checkpoints[-1].step < 120
    assert all(checkpoint.load() for checkpoint in trajectory.checkpoints)
