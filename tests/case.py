"""What a case is, and the small pieces that cases are made of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Case:
    """One thing that a LightningModule may do.

    Args:
        name: a phrase.
        make: builds the module; called under a seed.
        train: dataset; called without arguments, so that every case has its own.
        queries: likewise.
        expected: "right" or "refused".
        says: for a refused one, fragments of the message: the cause, and the way out.
        loss: per-sample losses that are passed.
        way_out: for a refused one, the ``loss=`` with which it is right.
        alone: the per-sample losses by which brute force replaces a step that fails on a batch of one.
        collate: the loader's.
        loader: makes the training loader of the dataset; None: batches of three in order.
        parameters: patterns.
        fit: train for two epochs with capture, then trace through its checkpoints.
        summed: the step returns the sum over the batch.
        by_index: the loss depends on ``batch_idx``: with ``fit``, every example has the index of its batch.
        dtype: float64 unless precision is the subject.
        tolerance: relative to the largest score of a query; None: 1e-10 in float64, 1e-5 in float32.
        offline: after the fit the Attributor gets a module made anew; the one that was fitted is for brute force.
        fit_with: what the fit trains on, a loader of batches of 3 in order or a DataModule; None: such a loader.
        trainer: options of a Trainer that is passed; None: none is.
        files: writes the checkpoints of a fit: (module, folder) -> ``cases_checkpoints.Files``.
        later: arguments of an ``Attributor`` in a later process, with a module that ``make_later`` (or ``make``) builds
            anew and with the trajectory of a fit on ``fit_with()``, a loader of batches of 3 in order or a DataModule.
        entering: what the fit does to a batch after collating it, for brute force.
        count: how many tokens (or class weights) an item of the dataset has, where the step returns a mean over those
            of the batch; None: examples have the same weight.
        double_truth: brute force takes module and data in float64, since plain autograd in float32 loses the digits.
    """

    name: str
    make: Callable[[], Any]
    train: Callable[[], Any]
    queries: Callable[[], Any]
    expected: str = "right"
    says: tuple[str, ...] = ()
    loss: Callable[..., Any] | None = None
    way_out: Callable[..., Any] | None = None
    alone: Callable[..., Any] | None = None
    collate: Callable[..., Any] | None = None
    loader: Callable[[Any], Any] | None = None
    parameters: Any = None
    fit: bool = False
    summed: bool = False
    by_index: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float | None = None
    offline: bool = False
    fit_with: Callable[[], Any] | None = None
    trainer: dict[str, Any] | None = field(default=None)
    files: Callable[..., Any] | None = None
    later: Callable[[], dict[str, Any]] | None = None
    make_later: Callable[[], Any] | None = None
    entering: Callable[[Any], Any] | None = None
    count: Callable[[Any], float] | None = None
    double_truth: bool = False

    @property
    def allowed(self):
        return self.tolerance or (1e-10 if self.dtype is torch.float64 else 1e-5)


class Step(pl.LightningModule):
    """A network and a loss; two parameter groups where asked for."""

    def __init__(self, net, loss=F.cross_entropy, two_groups=False):
        super().__init__()
        self.net, self.loss, self.two_groups = net, loss, two_groups

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self):
        groups = [p for p in self.parameters() if p.requires_grad]
        if self.two_groups:
            biases = [p for n, p in self.named_parameters() if n.endswith("bias")]
            others = [p for n, p in self.named_parameters() if not n.endswith("bias")]
            groups = [{"params": others, "lr": 0.05}, {"params": biases, "lr": 0.2}]
        optimizer = torch.optim.SGD(groups, lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Items(Dataset):
    """A list of anything."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def inputs(*shape, target="class", n=8, seed=1, classes=3, dtype=torch.float64, high=None):
    """A function that makes (x, y) pairs: x normal, or ids below ``high``; y a class, a number, or a map of classes."""

    def make():
        g = drawn(seed)
        x = torch.randint(high, (n, *shape), generator=g) if high else torch.randn(n, *shape, generator=g, dtype=dtype)
        if target == "class":
            y = torch.randint(classes, (n,), generator=g)
        elif target == "number":
            y = torch.randn(n, generator=g, dtype=dtype)
        elif target == "binary":
            y = torch.randint(2, (n,), generator=g).to(dtype)
        else:
            y = torch.randint(classes, (n, *target), generator=g)
        return Items(list(zip(x, y, strict=True)))

    return make


def both(*shape, **options):
    """Training data and queries of one kind."""
    return {"train": inputs(*shape, **options), "queries": inputs(*shape, **{**options, "n": 4, "seed": 2})}


class Pooled(nn.Module):
    """Mean over everything behind the channels, then classes."""

    def __init__(self, channels, classes=3):
        super().__init__()
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(x.flatten(2).mean(-1))


class Take(nn.Module):
    """Reduces a sequence [batch, time, width] to its mean over time, or takes the first of a tuple."""

    def forward(self, x):
        x = x[0] if isinstance(x, tuple) else x
        return x.mean(1)


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def mlp(width=5, hidden=6, classes=3):
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def with_statistics(net):
    """Running statistics as if it had been trained."""
    g = drawn(5)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=g))
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=g) + 0.5)
    return net
