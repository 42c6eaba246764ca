"""Values that no module holds: noted where the fit changes them, refused where they differ when a question is asked."""

import pytest
import pytorch_lightning as pl
import torch
from case import Step, drawn, mlp
from fits import QUIET
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributor, GradientDot, Influence, Trajectory

SCALE = 1.0
CALLS = 0
SETTINGS = {"scale": 1.0}


class Options:
    scale = 1.0


def scaled(loss):
    return loss * SCALE


class ByGlobal(Step):
    def training_step(self, batch, batch_idx):
        return scaled(super().training_step(batch, batch_idx))

    def change(self):
        globals()["SCALE"] *= 0.5


class ByDict(Step):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * SETTINGS["scale"]

    def change(self):
        SETTINGS["scale"] *= 0.5


class ByClass(Step):
    scale = 1.0

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.scale

    def change(self):
        type(self).scale *= 0.5


def closed():
    scale = 1.0

    class ByClosure(Step):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * scale

        def change(self):
            nonlocal scale
            scale *= 0.5

    return ByClosure


KINDS = {
    "a global": (lambda: ByGlobal, "test_code_values.SCALE"),
    "a dict": (lambda: ByDict, "test_code_values.SETTINGS['scale']"),
    "a class attribute": (lambda: ByClass, "ByClass.scale"),
    "a closure": (closed, "scale"),
}


class Changes(pl.Callback):
    def on_train_epoch_start(self, trainer, module):
        module.change()


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    monkeypatch.setitem(SETTINGS, "scale", 1.0)
    monkeypatch.setattr(ByClass, "scale", 1.0)


def data(seed=1):
    g = drawn(seed)
    return TensorDataset(torch.randn(12, 5, generator=g).double(), torch.randint(3, (12,), generator=g))


def fitted(kind, folder, *callbacks):
    torch.manual_seed(0)
    module = kind(mlp(5, classes=3)).double()
    trainer = pl.Trainer(max_epochs=2, callbacks=[*callbacks, Influence(dirpath=str(folder))], **QUIET)
    trainer.fit(module, DataLoader(data(), 4))
    return module, Trajectory.load(folder)


@pytest.mark.parametrize("name", KINDS)
def test_what_a_fit_changes_is_noted_by_name(name, tmp_path):
    make, path = KINDS[name]
    module, trajectory = fitted(make(), tmp_path, Changes())
    notes = Attributor(module, data(), trajectory).score(GradientDot(), data(2)).notes
    assert any("The fit changed" in note and path in note and "attribute of the module" in note for note in notes)


@pytest.mark.parametrize("name", KINDS)
def test_what_no_fit_changes_is_not(name, tmp_path):
    module, trajectory = fitted(KINDS[name][0](), tmp_path)
    assert not any(
        "The fit changed" in n for n in Attributor(module, data(), trajectory).self_influence(GradientDot()).notes
    )


@pytest.mark.parametrize("name", KINDS)
def test_what_is_another_one_now_is_refused_by_the_losses(name, tmp_path):
    module, trajectory = fitted(KINDS[name][0](), tmp_path)
    module.change()
    with pytest.raises(ValueError, match="to give the losses of the fit"):
        Attributor(module, data(), trajectory).score(GradientDot(), data(2))


class Weighted(Step):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.trainer.callbacks[0].weight


class Weight(pl.Callback):
    weight = 0.5


def test_what_a_step_reads_of_a_callback_is_refused_without_it(tmp_path):
    module, trajectory = fitted(Weighted, tmp_path, Weight())
    module.trainer = None
    with pytest.raises((ValueError, RuntimeError, AttributeError), match="callbacks"):
        Attributor(module, data(), trajectory).score(GradientDot(), data(2))


class OtherBatches(DataLoader):
    """Changes what its dataset and collate function make."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x * 3.0 + 1.0, y


def test_a_loader_that_changes_its_batches_is_warned_of(tmp_path):
    module = Step(mlp(5, classes=3)).double()
    trainer = pl.Trainer(max_epochs=2, callbacks=[Influence(dirpath=str(tmp_path))], **QUIET)
    with pytest.warns(UserWarning, match="does not know which examples are in a batch"):
        trainer.fit(module, OtherBatches(data(), 4))
    found = Attributor(module, OtherBatches(data(), 4), Trajectory.load(tmp_path)).score(GradientDot(), data(2))
    assert any("does not know which examples" in note for note in found.notes), found.notes


class Registry(dict):
    """A dict that is read in a way of its own, as in libraries that load models by name."""

    def get(self, key):
        raise RuntimeError(f"there is no {key}")


class Odd:
    """An object that answers no question about itself."""

    def __getattr__(self, name):
        raise AttributeError(name) if name.startswith("__") else RuntimeError(name)


REGISTRY = Registry(scale=1.0)
ODD = Odd()


class ByRegistry(Step):
    registry = REGISTRY
    odd = ODD

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * REGISTRY["scale"] + 0 * isinstance(ODD, int)


def test_objects_of_any_class_leave_the_record_alone(tmp_path):
    _, trajectory = fitted(ByRegistry, tmp_path)
    assert trajectory.finished
