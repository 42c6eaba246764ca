"""What stands between loss and step is noted, and what only looks like it is not."""

import pytest
import pytorch_lightning as pl
import torch
from fits import Net, fit, loader
from pytorch_lightning.callbacks import StochasticWeightAveraging

from lightning_influence import Influence, Trajectory


class Backward(Net):
    def backward(self, loss):
        (loss * 3).backward()


class ByHand(Net):
    """Manual optimization: only the step itself knows that it divides its loss."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch) / 2)
        optimizer.step()


class AfterBackward(Net):
    def on_after_backward(self):
        for p in self.parameters():
            p.grad.mul_(3)


class BeforeStep(Net):
    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad = None


class Skips(Net):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        closure()


class HookOnWeight(Net):
    def on_fit_start(self):
        next(self.parameters()).register_hook(lambda g: g * 3)


class HookDuringFit(Net):
    def on_train_epoch_end(self):
        next(self.parameters()).register_post_accumulate_grad_hook(lambda p: None)


class HookOnLayer(Net):
    def on_fit_start(self):
        self.register_full_backward_pre_hook(lambda m, g: None)


class Tripled(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-3 * group["lr"])
        return loss


class OwnStep(Net):
    def configure_optimizers(self):
        return Tripled(self.parameters(), lr=0.01)


class HookBeforeStep(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        optimizer.register_step_pre_hook(lambda *args: None)
        return optimizer


class Renamed(torch.optim.SGD):
    pass


class OfTorch(Net):
    def configure_optimizers(self):
        return Renamed(self.parameters(), lr=0.01)


class Dropping(pl.Callback):
    def on_after_backward(self, trainer, module):
        module.zero_grad()


def notes_of(module, folder, *callbacks):
    fit(module, loader(), Influence(dirpath=folder), *callbacks, max_epochs=2)
    trajectory = Trajectory.load(next(folder.glob("run-*")))
    return trajectory, [note for note in trajectory.notes if "Between the loss" in note]


@pytest.mark.parametrize(
    ("kind", "callbacks", "name"),
    [
        (Backward, (), "`Backward.backward`"),
        (AfterBackward, (), "`AfterBackward.on_after_backward`"),
        (BeforeStep, (), "`BeforeStep.on_before_optimizer_step`"),
        (Skips, (), "`Skips.optimizer_step`"),
        (HookOnWeight, (), "a hook on `"),
        (HookDuringFit, (), "a hook on `"),
        (HookOnLayer, (), "a backward hook on `"),
        (OwnStep, (), "`Tripled.step`"),
        (HookBeforeStep, (), "a hook before `SGD.step`"),
        (Net, (Dropping,), "`Dropping.on_after_backward`"),
        (ByHand, (), "`ByHand.training_step`"),
    ],
)
def test_what_may_change_gradients_is_noted_by_name(kind, callbacks, name, tmp_path):
    trajectory, notes = notes_of(kind(), tmp_path, *(make() for make in callbacks))
    assert len(notes) == 1
    assert name in notes[0]
    assert trajectory.adaptive == (kind is OwnStep)  # units are arbitrary


@pytest.mark.parametrize("kind", [Net, OfTorch])
def test_what_lightning_and_torch_bring_along_is_not_noted(kind, tmp_path):
    trajectory, notes = notes_of(kind(), tmp_path, StochasticWeightAveraging(0.01))
    assert not notes
    assert not trajectory.adaptive
