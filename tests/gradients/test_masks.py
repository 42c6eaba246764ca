"""Means over what a mask leaves of a batch: right, also where one example in many has less."""

import oracles
import pytest
import torch
from case import Step, mlp
from torch.nn import functional as F
from torch.utils.data import TensorDataset, default_collate

from lightning_influence import Attributor, GradientDot

MEANS = {
    "divided by the sum": lambda losses, mask: (losses * mask).sum() / mask.sum(),
    "divided by a sum that is at least one": lambda losses, mask: (losses * mask).sum() / mask.sum().clamp(min=1),
    "divided by a sum of sums": lambda losses, mask: (losses * mask).sum() / mask.sum(1).sum(),
    "divided by Python's sum": lambda losses, mask: (losses * mask).sum() / sum(mask.sum(1)),
    "divided by a number": lambda losses, mask: (losses * mask).sum() / mask.sum().item(),
    "multiplied": lambda losses, mask: (losses * mask).sum() * mask.double().sum().reciprocal(),
    "divided by a mean": lambda losses, mask: (losses * mask).mean() / mask.double().mean(),
    "divided by a count": lambda losses, mask: (losses * mask).sum() / torch.count_nonzero(mask),
    "indexed": lambda losses, mask: losses[mask].mean(),
    "selected": lambda losses, mask: losses.masked_select(mask).mean(),
}


class Masked(Step):
    def __init__(self, mean):
        super().__init__(mlp())
        self.mean = mean

    def training_step(self, batch, batch_idx):
        x, y, mask = batch
        return self.mean(F.cross_entropy(self.net(x).transpose(1, 2), y, reduction="none"), mask)


def data(odd):
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(200, 4, 5, generator=draw, dtype=torch.float64), torch.randint(3, (200, 4), generator=draw)
    mask = torch.ones(200, 4, dtype=torch.bool)
    mask[:, 3] = False
    mask[odd, 1] = False  # neither the probe nor the self-check meets it
    return TensorDataset(x, y, mask)


def attributor(mean, odd):
    torch.manual_seed(0)
    return Attributor(Masked(mean).double(), data(odd), batch_size=8)


@pytest.mark.parametrize("name", MEANS)
def test_one_example_with_a_shorter_mask_is_right(name):
    asked = attributor(MEANS[name], [101])
    ones = [default_collate([data([101])[i]]) for i in (3, 101)]
    expected = oracles.squared(oracles.rows(asked.module, ones, [n for n, _ in asked.module.named_parameters()]))
    found = asked.self_influence(GradientDot())
    assert "share" in " ".join(found.notes)
    oracles.assert_scores(found.values[[3, 101]], expected, 1e-10)


@pytest.mark.parametrize("name", MEANS)
def test_masks_of_one_length_are_right(name):
    asked = attributor(MEANS[name], [])
    ones = [default_collate([data([])[i]]) for i in range(24)]
    expected = oracles.squared(oracles.rows(asked.module, ones, [n for n, _ in asked.module.named_parameters()]))
    found = asked.self_influence(GradientDot())
    assert "Gradients of all 57 parameters were computed the fast way" in found.notes
    oracles.assert_scores(found.values[:24], expected, 1e-10)


def test_a_mean_within_each_example_may_have_any_mask():
    mean = lambda losses, mask: ((losses * mask).sum(1) / mask.sum(1)).mean()  # noqa: E731
    asked = attributor(mean, [101, 3])
    ones = [default_collate([data([101, 3])[i]]) for i in (3, 101)]
    expected = oracles.squared(oracles.rows(asked.module, ones, [n for n, _ in asked.module.named_parameters()]))
    oracles.assert_scores(asked.self_influence(GradientDot()).values[[3, 101]], expected, 1e-10)
