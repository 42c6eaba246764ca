"""What a step may ask and write: its Trainer's stage, a batch of its own class."""

import oracles
import pytorch_lightning as pl
import torch
from case import Items, drawn
from fits import QUIET, fit, seeded
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot


class Asking(pl.LightningModule):
    """Has a loss only while its Trainer trains."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1]) if self.trainer.training else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Bag:
    """A batch that moves itself between devices, in place."""

    def __init__(self, items):
        self.x, self.y = torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    def to(self, *args, **kwargs):
        self.x, self.y = self.x.to(*args, **kwargs), self.y.to(*args, **kwargs)
        return self


class Writing(pl.LightningModule):
    """Leaves its features in the batch, or changes what is there."""

    def __init__(self, inside):
        super().__init__()
        self.layer, self.inside = torch.nn.Linear(4, 4), inside

    def training_step(self, batch):
        if self.inside:
            batch.x *= 2
            return F.cross_entropy(self.layer(batch.x), batch.y)
        batch.x = self.layer(batch.x)
        return F.cross_entropy(batch.x, batch.y)


def data(n=9):
    g = drawn(1)
    return Items(list(zip(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g), strict=True)))


def test_a_step_finds_its_trainer_training_and_the_trainer_as_it_was():
    module = seeded(Asking)
    trainer = fit(module, DataLoader(data(), 3))
    stage = trainer.state.stage
    scores = Attributor(module, DataLoader(data(), 3)).score(GradientDot(), data())
    assert trainer.state.stage is stage
    trainer.training = True
    ones = [next(iter(DataLoader([pair]))) for pair in data().items]
    expected = oracles.inner(*[oracles.rows(module, ones, ["layer.weight", "layer.bias"])] * 2)
    oracles.assert_scores(scores.values, expected, 1e-5)


def test_without_a_trainer_a_step_finds_one_that_trains():
    Attributor(seeded(Asking), DataLoader(data(), 3)).score(GradientDot(), data())


def test_what_a_step_writes_into_a_batch_of_its_own_class_is_gone_at_the_next_pass():
    for inside in (False, True):
        module = seeded(Writing, inside)
        attributor = Attributor(module, DataLoader(data(), 3, collate_fn=Bag), trainer=pl.Trainer(**QUIET))
        names = ["layer.weight", "layer.bias"]
        expected = oracles.inner(*[oracles.rows(module, [Bag([pair]) for pair in data().items], names)] * 2)
        for _ in range(2):
            oracles.assert_scores(attributor.score(GradientDot(), data()).values, expected, 1e-5)
