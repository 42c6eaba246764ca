"""What happens on a full disk: python full_disk.py FOLDER [limit]; the folder is a small file system.

With `limit` no file may grow any more, whatever the file system; systems without mounts of their own test that.
"""

import errno
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from fits import Indexed, Net, fit, loader, seeded
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    EKFAC,
    Attributor,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    LeaveOneOut,
    MissingEvidence,
    Refit,
    RepresenterPoints,
    Scores,
    TracInCP,
    Trajectory,
)

FOLDER, LIMITED = Path(sys.argv[1]), "limit" in sys.argv
BALLAST = FOLDER / "ballast"
ELSEWHERE = Path(sys.argv[1]).parent / "elsewhere"
FULL = errno.EFBIG if LIMITED else errno.ENOSPC


def fill():
    """From here on nothing can be written."""
    if LIMITED:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return
    with BALLAST.open("ab", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError:
                continue


def free():
    if LIMITED:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        BALLAST.unlink()


class During(Callback):
    """A disk that is full in the second of three epochs, or from it on, or from the first step."""

    def __init__(self, first, last):
        self.first, self.last = first, last

    def on_train_start(self, trainer, pl_module):
        if self.first < 0:
            fill()

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.first:
            fill()
        elif self.last is not None and trainer.current_epoch == self.last + 1:
            free()


def recording(first, last, keep=()):
    final = InfluenceFunction(EKFAC(damping=0.1))
    methods = {"final": final, "dot": GradientDot(), "sum": TracInCP(), "followed": HyDRA.during_fit(hessian=False)}
    if first < 0:
        del methods["followed"]  # it asks for space before the fit
    influence = Influence(methods, queries=Indexed(3), dirpath=FOLDER / "runs", self_influence=True, max_cost=1e9)
    again, module = (seeded(Net, weight_decay=0.05) for _ in range(2))
    fit(again, loader(), Influence(dirpath=FOLDER / "whole"), max_epochs=3)
    whole = Attributor(again, Indexed(), Trajectory.load(FOLDER / "whole"))
    fit(module, loader(), During(first, last), *keep, influence, max_epochs=3, enable_checkpointing=bool(keep))
    for name in ("final", "dot"):
        expected = whole.score(methods[name], Indexed(3))
        torch.testing.assert_close(influence.scores[name].values, expected.values)
        notes = influence.scores[name].notes
        assert any("broke off" in n and str(FOLDER) in n and "are missing" in n for n in notes), notes
    assert set(influence.scores) == {"final", "dot"}, influence.scores.reasons
    assert "sum" in influence.scores.reasons
    assert set(influence.scores.reasons) == methods.keys() - {"final", "dot"}
    assert any("broke off" in n for n in influence.attributor.score(GradientDot(), Indexed(3)).notes)
    return module


def broken_record(module):
    trajectory = Trajectory.load(FOLDER / "runs")
    assert "the fit went on" in trajectory.broken
    assert trajectory.broken in trajectory.notes
    assert not any("did not finish" in note for note in trajectory.notes)
    assert all(checkpoint.load() for checkpoint in trajectory.checkpoints)
    try:
        Attributor(module, Indexed(), trajectory).score(GradientDot(), Indexed(3))
    except MissingEvidence as error:
        assert "the fit went on" in str(error)  # noqa: PT017
    else:
        raise AssertionError("scores of the weights in the middle of the fit")
    return trajectory


def one_epoch():
    keep = ModelCheckpoint(ELSEWHERE, save_last=True)
    module = recording(1, 1, keep=[] if LIMITED else [keep])
    trajectory = broken_record(module)
    if LIMITED:  # Lightning's own checkpoints could not be written either
        return
    by_file = Attributor(module, Indexed(), trajectory, weights=keep.last_model_path)
    expected = Attributor(module, Indexed()).score(GradientDot(), Indexed(3))
    torch.testing.assert_close(by_file.score(GradientDot(), Indexed(3)).values, expected.values)
    refused(lambda: by_file.score(TracInCP(), Indexed(3)), MissingEvidence, "the fit went on")


def to_the_end():
    broken_record(recording(1, None))


def from_the_start():
    recording(-1, None)
    refused(lambda: Trajectory.load(FOLDER / "runs"), MissingEvidence, "got none")


def refused(call, kind, *texts):
    try:
        call()
    except kind as error:
        assert all(text in str(error) for text in texts), error  # noqa: PT017
        return error
    raise AssertionError("Expected an error")


def saving():
    attributor = Attributor(seeded(Net), Indexed())
    scores, itself = attributor.score(GradientDot(), Indexed(3)), attributor.self_influence(GradientDot())
    before = scores.save(FOLDER / "kept.arrow").read_bytes()
    fill()
    for write in (scores.save, itself.save, itself.report, scores.report):
        path = FOLDER / "x.html"
        error = refused(lambda write=write, path=path: write(path), OSError, str(path))
        assert error.errno == FULL
    error = refused(lambda: scores.save(FOLDER / "kept.arrow", overwrite=True), OSError, "kept.arrow")
    assert (FOLDER / "kept.arrow").read_bytes() == before
    error = refused(lambda: attributor.score(GradientDot(), Indexed(3), path=FOLDER / "y"), OSError, str(FOLDER / "y"))
    assert error.errno == FULL
    assert sorted(p.name for p in FOLDER.iterdir() if p != BALLAST) == ["kept.arrow"]
    free()
    scores.save(FOLDER / "y")
    assert Scores.load(FOLDER / "y").values.equal(scores.values)


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def beside_the_run():
    """Curvature, features, retrained models, and the vectors of hypergradients."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4), torch.arange(12) % 2)
    module = seeded(Plain)
    fit(module, DataLoader(data, 4), Influence(dirpath=FOLDER / "runs"), max_epochs=1)
    trajectory = Trajectory.load(FOLDER / "runs")
    attributor = Attributor(module, data, trajectory)
    method = InfluenceFunction(EKFAC(damping=0.1))
    expected = Attributor(module, data).score(method, data).values
    fill()
    found = attributor.score(method, data)
    torch.testing.assert_close(found.values, expected)
    assert any("could not be stored" in note and str(FOLDER) in note for note in found.notes), found.notes
    refused(lambda: attributor.score(RepresenterPoints(), data), OSError, "features")
    free()
    (FOLDER / "bank").mkdir()
    fill()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        retrain = Attributor(module, data, trajectory, refit=Refit(dirpath=str(FOLDER / "bank"), n_jobs=1))
        refused(lambda: retrain.score(LeaveOneOut(), data), OSError, str(FOLDER / "bank"))
    from lightning_influence.tracking.hypergradients import _mapped
    from lightning_influence.tracking.record import save

    error = refused(lambda: _mapped(FOLDER, (1000, 100), torch.zeros(1)), OSError, str(FOLDER))
    assert error.errno == FULL
    error = refused(lambda: save(FOLDER / "state.pt", torch.zeros(100_000)), OSError, "state.pt")
    assert error.errno == FULL
    left = [p.name for p in FOLDER.rglob(".*.tmp")]
    assert not left, left


def read_only():
    if LIMITED:
        return
    subprocess.run(["mount", "-o", "remount,ro", str(FOLDER)], check=True)
    attributor = Attributor(seeded(Net), Indexed())

    def never(*_, **__):
        raise AssertionError("the work began")

    attributor._open = never
    for path in (FOLDER / "new" / "x", FOLDER / "x"):
        for arguments in ((GradientDot(), Indexed(3)), (GradientDot(),)):
            ask = attributor.score if len(arguments) == 2 else attributor.self_influence
            error = refused(lambda ask=ask, a=arguments, path=path: ask(*a, path=path), OSError, str(path))
            assert error.errno == errno.EROFS


for scenario in (one_epoch, to_the_end, from_the_start, saving, beside_the_run, read_only):
    print(scenario.__name__, flush=True)
    scenario()
    if LIMITED:
        free()
    BALLAST.unlink(missing_ok=True) if scenario is not read_only else None
    for path in FOLDER.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
print("done", flush=True)
