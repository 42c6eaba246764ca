"""What a step computes of its batch: values of each example, sums over them, or what mixes them."""

import pytest
import torch
from case import drawn, mlp
from torch.nn import functional as F

from lightning_influence.gradients.mixing import MixingWatch

NET = mlp().double()


def loss(x, y):
    return F.cross_entropy(NET(x), y)


def each(x, y):
    return F.cross_entropy(NET(x), y, reduction="none")


PURE = {
    "mean": loss,
    "sum": lambda x, y: each(x, y).sum() / len(y),
    "two losses": lambda x, y: loss(x, y) + 0.5 * NET(x).square().mean(),
    "trained weights of losses": lambda x, y: torch.exp(-NET[0].bias.sum()) * loss(x, y) + NET[0].bias.sum(),
    "a penalty": lambda x, y: loss(x, y) + NET[0].weight.norm().sqrt(),
    "each clamped": lambda x, y: each(x, y).clamp(max=3).mean(),
    "a mean over known ones": lambda x, y: (each(x, y) * (y > 0)).sum() / (y > 0).sum().clamp(min=1),
    "softmax over classes": lambda x, y: NET(x).softmax(1)[torch.arange(len(y)), y].log().neg().mean(),
    "normalised features": lambda x, y: F.normalize(NET(x)).square().sum(1).mean(),
    "the largest of each": lambda x, y: NET(x).max(1).values.mean() + NET(x).std(1).mean(),
    "the larger of two": lambda x, y: torch.max(each(x, y), NET(x).square().mean(1)).mean(),
    "an accuracy aside": lambda x, y: ((NET(x).argmax(1) == y).double().mean(), loss(x, y))[1],
    "transposed": lambda x, y: NET(x).T.square().mean(),
    "columns": lambda x, y: NET(x)[:, 0].square().mean(),
    "a mask": lambda x, y: NET(x)[y > 0].square().sum() / len(y),
    "matrices times each": lambda x, y: loss((x @ torch.eye(x.shape[1]).double()) @ NET[0].weight.T @ NET[0].weight, y),
    "weighted by a product": lambda x, y: each(x, y) @ (1 + y.double()) / len(y),
    "gathered classes": lambda x, y: NET(x).gather(1, y[:, None]).square().mean(),
    "rows by class": lambda x, y: (torch.ones(3).double()[y] * each(x, y)).mean(),
    "stacked losses": lambda x, y: torch.stack([loss(x, y), NET(x).abs().mean()]).sum(),
}
MIXED = {
    "clamp": lambda x, y: loss(x, y).clamp(max=3),
    "sqrt": lambda x, y: NET(x).square().mean().sqrt(),
    "minimum": lambda x, y: torch.minimum(loss(x, y), torch.tensor(3.0)),
    "gt": lambda x, y: loss(x, y) * (loss(x, y).detach() > 3),
    "mul": lambda x, y: loss(x, y) * NET(x).mean(),
    "div": lambda x, y: NET(x).mean() / loss(x, y),
    "any": lambda x, y: loss(x, y) * (1 + (x > 20).any()),
    "amax": lambda x, y: loss(x, y) / x.abs().amax().clamp(min=9),
    "roll": lambda x, y: loss(torch.where(x > 20, x.roll(1, 0), x), y),
    "cumsum": lambda x, y: loss(x + (x > 20).cumsum(0), y),
    "sort": lambda x, y: each(x, y).sort().values[:2].mean(),
    "softmax": lambda x, y: (each(x, y).softmax(0) * each(x, y)).sum(),
    "std": lambda x, y: loss(x, y) + torch.relu(x.std(0).max() - 9),
    "sub": lambda x, y: loss(x - x.mean(0), y),
    "position": lambda x, y: loss(x, y) + (x[0, 0] > 20) * NET(x).mean(),
    "bincount": lambda x, y: F.cross_entropy(NET(x), y, weight=1 / (y.bincount(minlength=3) + 1.0).double()),
    "pairs of": lambda x, y: loss(torch.where(x > 20, (x[:, None] - x[None]).abs().sum(1), x), y),
    "matmul` of pairs": lambda x, y: loss(torch.where(x > 20, (x @ x.T).softmax(1) @ x, x), y),
    "that sums over": lambda x, y: loss(torch.where(x > 20, torch.ones(1, len(x)).double() @ x, x), y),
    "chosen by position": lambda x, y: loss(torch.where(x > 20, x[torch.arange(len(x)).roll(1)], x), y),
    "by position": lambda x, y: loss(torch.where(x > 20, x.index_select(0, torch.zeros(len(x)).long()), x), y),
    "part of the": lambda x, y: loss(x, y) + (x[2] > 20).sum() * NET(x).mean() + (x[:2, 1] > 20).sum(),
    "gather": lambda x, y: loss(torch.where(x > 20, x.gather(0, torch.zeros_like(x).long()), x), y),
    "amax` over": lambda x, y: loss(x, y) + (NET(x).T.amax(1) > 9).sum() * NET(x).mean(),
}


def watched(step):
    """What mixes examples, by passes of 3 and of 5 of them: there are as many classes and numbers, too."""
    watch = None
    for n in (3, 5):
        x, y = torch.randn(n, 5, generator=drawn(0), dtype=torch.float64), torch.arange(n) % 3
        watch = MixingWatch(n, watch)
        watch.run(lambda batch: step(*batch), watch.move(list, (x, y)))
    return watch.why


@pytest.mark.parametrize("name", PURE)
def test_a_sum_over_examples_mixes_nothing(name):
    assert watched(PURE[name]) is None


@pytest.mark.parametrize("name", MIXED)
def test_what_may_mix_examples_is_named(name):
    assert name in watched(MIXED[name])


@pytest.mark.parametrize("read", [float, int, bool, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy])
def test_reading_numbers_of_the_batch_is_noticed(read):
    x = torch.ones(3, 5)
    for step, noticed in (
        (lambda x: (read(x.sum()), x.sum())[1], True),
        (lambda x: (read(torch.ones(())), x)[1], False),
    ):
        watch = MixingWatch(3)
        watch.run(step, watch.move(list, [x])[0])
        assert watch.reads is noticed
