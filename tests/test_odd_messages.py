"""Refusals of odd fits name the cause and a way out."""

import pytest
import pytorch_lightning as pl
import torch
from case import Items, Step, both, mlp
from cases_losses import each
from fits import QUIET
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot, Influence, TracInCP, Trajectory

BATCH = 4


class Keyed(Items):
    """Examples by words."""

    def __getitem__(self, key):
        return dict(zip(map(str, range(len(self.items))), self.items, strict=True))[key]


class Combined(Step):
    def training_step(self, batch, batch_idx):
        return sum(super(Combined, self).training_step(batch[key], batch_idx) for key in ("a", "b"))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Freezing(Combined):
    """Trains its first layer from the second epoch on."""

    def training_step(self, batch, batch_idx):
        self.net[0].requires_grad_(self.current_epoch > 0)
        return Step.training_step(self, batch, batch_idx)


class Pairs(Step):
    """Compares the halves of a batch."""

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        half = len(out) // 2
        return (out[:half] - out[half : 2 * half]).square().mean()


def fitted(module, loader, folder):
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[Influence(dirpath=folder)])
    trainer.fit(module.double(), loader)
    return Trajectory.load(folder)


def test_a_dataset_with_keys_that_are_words():
    data = both(5, n=8)
    keyed = Keyed(data["train"]().items)
    ask = Attributor(Step(mlp()).double(), DataLoader(keyed, BATCH, sampler=list("01234567")))
    with pytest.raises(ValueError, match=r"Keyed to have the indices 0, 1.*KeyError: 0.*Wrap it in a Dataset"):
        ask.score(GradientDot(), data["queries"]())


def test_one_dataset_of_a_fit_that_combined_loaders(tmp_path):
    data = both(5, n=8)
    trajectory = fitted(Combined(mlp()), {key: DataLoader(data["train"](), BATCH) for key in "ab"}, tmp_path)
    ask = Attributor(Combined(mlp()).double(), data["train"](), trajectory)
    with pytest.raises(ValueError, match=r"combined those of several loaders.*trajectory\.of_loader\(0\).*loss="):
        ask.score(TracInCP(), data["queries"]())


def test_a_step_that_freezes_parameters(tmp_path):
    data, module = both(5, n=8), Freezing(mlp())
    trajectory = fitted(module, DataLoader(data["train"](), BATCH), tmp_path)
    ask = Attributor(module, DataLoader(data["train"](), BATCH), trajectory)
    with pytest.raises(ValueError, match=r"leave `requires_grad` as it is.*`net\.0\.weight`.*detach.*loss="):
        ask.score(TracInCP(), data["queries"]())
    assert all(p.requires_grad for p in module.parameters())
    later = Attributor(module, DataLoader(data["train"](), BATCH), trajectory, loss=each(F.cross_entropy))
    assert later.score(TracInCP(), data["queries"]()).values.isfinite().all()


def test_a_loss_of_pairs_in_a_batch():
    data = both(5, n=8)
    ask = Attributor(Pairs(mlp()).double(), DataLoader(data["train"](), BATCH))
    with pytest.raises(ValueError, match=r"finite loss for a batch, and NaN.*(mixes|compares) examples.*loss="):
        ask.score(GradientDot(), data["queries"]())
