"""What a step may ask and write: its Trainer's stage, a batch of its own class."""

import contextlib

import oracles
import pytest
import pytorch_lightning as pl
import torch
from case import Items, Step, drawn
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


class Precise(pl.LightningModule):
    """Notes under which precision its products are made."""

    def __init__(self, seen):
        super().__init__()
        self.layer, self.note = torch.nn.Linear(4, 3), lambda: seen.add(precision())

    def training_step(self, batch):
        self.note()
        return F.cross_entropy(self.layer(batch[0]), batch[1])


def precision():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@contextlib.contextmanager
def coarse():
    """TF32 and bfloat16 products wherever the hardware has them, as many scripts ask for."""
    before = precision()
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


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


def test_scores_are_taken_without_tf32_and_the_users_choice_comes_back():
    seen = set()
    with coarse():
        Attributor(seeded(Precise, seen), DataLoader(data(), 3)).score(GradientDot(), data())
        assert precision() == ("medium", True)
    assert seen == {("highest", False)}


@pytest.mark.gpu
def test_on_a_gpu_that_trains_in_tf32_scores_are_those_of_full_precision():
    net = torch.nn.Sequential(torch.nn.Linear(4, 256), torch.nn.Tanh(), torch.nn.Linear(256, 3))
    module = seeded(Step, net)
    ones = [next(iter(DataLoader([pair]))) for pair in data().items]
    names = [name for name, _ in module.named_parameters()]
    expected = oracles.inner(*[oracles.rows(module, ones, names)] * 2)
    trainer = pl.Trainer(**{**QUIET, "accelerator": "gpu"})
    with coarse():
        scores = Attributor(module, DataLoader(data(), 3), trainer=trainer).score(GradientDot(), data())
    oracles.assert_scores(scores.values, expected, 1e-5)
    assert next(module.parameters()).device.type == "cpu"
