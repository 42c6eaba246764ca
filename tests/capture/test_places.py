"""Where runs are written: URLs, tuners that leave nothing, and several fits at one folder."""

import random
import subprocess
import sys

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET, Indexed, Net, fit, loader, recorded, seeded
from pytorch_lightning.tuner import Tuner

from lightning_influence import GradientDot, Influence
from lightning_influence.capture.identity import _taps
from lightning_influence.capture.places import local_path
from lightning_influence.compat import MisconfigurationException


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("runs", "runs"),
        ("/data/a:b/runs", "/data/a:b/runs"),
        (r"C:\runs", r"C:\runs"),
        ("file:///data/runs", "/data/runs"),
        ("local:///data/runs", "/data/runs"),
        ("s3://bucket/runs", None),
        ("gs://bucket", None),
        ("hdfs://host:9000/runs", None),
        ("memory://runs", None),
        ("simplecache::s3://bucket/runs", None),
        ("abfs+x://runs", None),
    ],
)
def test_which_paths_are_local(path, expected):
    assert local_path(path) == expected


@pytest.mark.parametrize("url", ["memory://runs", "s3://bucket/runs", "gs://bucket", "hdfs://host/runs"])
def test_a_url_as_folder_is_refused_before_the_first_step(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = seeded(Net)
    with pytest.raises(MisconfigurationException, match=r"got '.*://.*Pass a local `dirpath=`"):
        fit(module, loader(), Influence(dirpath=url))
    assert module.seen == []
    assert not list(tmp_path.iterdir())


def test_a_url_as_the_trainers_root_gives_way_to_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    influence = Influence()
    with pytest.warns(UserWarning, match=r"since 'memory://runs/influence' is no local folder.*`Influence\(dirpath"):
        fit(seeded(Net), loader(), influence, default_root_dir="memory://runs")
    assert influence.run_dir == tmp_path / "influence" / "run-0"
    assert influence.trajectory.finished
    assert [path.name for path in tmp_path.iterdir()] == ["influence"]


@pytest.mark.parametrize("prefix", ["file://", "local://"])
def test_a_url_of_a_local_file_is_a_folder(prefix, tmp_path):
    influence = Influence(dirpath=f"{prefix}{tmp_path}/runs")
    fit(seeded(Net), loader(), influence)
    assert influence.run_dir == tmp_path / "runs" / "run-0"


# ---- tuners ---------------------------------------------------------------------------------------------------------


class Tuned(Net):
    batch_size = 2

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)


TUNERS = {
    "lr_find": lambda tuner, module: tuner.lr_find(module, num_training=10, update_attr=False),
    "scale_batch_size": lambda tuner, module: tuner.scale_batch_size(module, max_trials=2),
}


def states():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("tune", TUNERS)
def test_a_tuner_leaves_no_run_and_changes_nothing(tune, tmp_path):
    ends = []
    for callbacks in ([], [Influence(dirpath=tmp_path / "influence")]):
        module = seeded(Tuned)
        trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=list(callbacks), default_root_dir=tmp_path)
        torch.manual_seed(1)
        TUNERS[tune](Tuner(trainer), module)
        ends.append((states(), module.seen, {k: v.tolist() for k, v in module.state_dict().items()}))
    assert ends[0] == ends[1]
    assert not (tmp_path / "influence").exists()
    assert not _taps
    assert "process_dataloader" not in vars(trainer.strategy)
    trainer.fit(module)
    micro = recorded(callbacks[0].trajectory)
    assert micro == module.seen[-len(micro) :]
    assert [path.name for path in (tmp_path / "influence").iterdir()] == ["run-0"]


@pytest.mark.parametrize("tune", TUNERS)
def test_a_tuner_keeps_the_scores_of_the_fit_before(tune, tmp_path):
    influence = Influence([GradientDot()], queries=Indexed(3), dirpath=tmp_path / "influence")
    trainer = pl.Trainer(**QUIET, max_epochs=1, callbacks=[influence], default_root_dir=tmp_path)
    module = seeded(Tuned)
    trainer.fit(module)
    before = influence.scores["GradientDot"], influence.run_dir, influence.trajectory
    TUNERS[tune](Tuner(trainer), module)
    assert influence.scores["GradientDot"] is before[0]
    assert influence.run_dir == before[1]
    assert len(influence.trajectory.steps) == len(before[2].steps)
    assert [path.name for path in (tmp_path / "influence").iterdir()] == ["run-0"]


# ---- sweeps ---------------------------------------------------------------------------------------------------------

CLAIMS = """
import sys, time
from pathlib import Path
from lightning_influence.capture.store import claim_run
start = float(sys.argv[2])
while time.time() < start:
    pass
print(*(claim_run(Path(sys.argv[1])).name for _ in range(40)))
"""


@pytest.mark.slow
def test_processes_never_share_a_run(tmp_path):
    import time

    start = str(time.time() + 8)
    command = [sys.executable, "-c", CLAIMS, str(tmp_path / "deep" / "runs"), start]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    claimed = [name for process in processes for name in process.communicate(timeout=120)[0].split()]
    assert sorted(claimed, key=lambda name: int(name[4:])) == [f"run-{k}" for k in range(120)]
