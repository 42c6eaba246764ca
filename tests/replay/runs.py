"""Small fits in float64 that write down what they were given, and the same as the oracle reads it."""

import copy
import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from fits import QUIET
from oracles import quiet_copy
from oracles_dynamic import call
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_influence import Attributor, Influence

N, QUERIES = 11, 4


class Attention(nn.Module):
    """One block of self-attention over a sequence, then classes."""

    def __init__(self, width=4):
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 6, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.block(self.table(x)).mean(1))


def mlp(drop=0.0):
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Dropout(drop), nn.Linear(5, 3))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 3))


def normed():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3))


NETS = {"mlp": mlp, "dropout": lambda: mlp(0.4), "cnn": cnn, "transformer": Attention, "batchnorm": normed}


class Fitted(pl.LightningModule):
    """Cross-entropy; notes the batches and the random states that it is given."""

    def __init__(self, net, kind="SGD", groups=({},), lr=0.1, summed=False, step=None):
        super().__init__()
        self.step = step
        self.net, self.kind, self.groups, self.lr, self.summed = net, kind, groups, lr, summed
        self.seen, self.states, self.given = [], [], []

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        if self.trainer.training:
            self.seen.append(index.tolist())
            self.states.append(torch.get_rng_state())
            self.given.append([t.clone() for t in batch])
        if self.step is not None:
            return self.step(self.net, x, y)
        return F.cross_entropy(self.net(x), y, reduction="sum" if self.summed else "mean")

    def configure_optimizers(self):
        parameters = list(self.named_parameters())
        last = [p for n, p in parameters if n.endswith("bias")]
        rest = [p for n, p in parameters if not n.endswith("bias")]
        divided = [[p for _, p in parameters]] if len(self.groups) == 1 else [rest, last]
        optimizer = getattr(torch.optim, self.kind)(
            [{"params": p, **settings} for p, settings in zip(divided, self.groups, strict=True)], lr=self.lr
        )
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


def joint(module, batch):
    """Losses of the joint batch."""
    return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def joint_sum(module, batch):
    return joint(module, batch)


@dataclass
class Run:
    """What the oracle reads."""

    module: Any
    start: dict
    windows: list
    rates: list
    groups: list
    kind: str
    divisor: int = 1
    mean: bool = True
    clip: Any = None
    renormalize: bool = False
    losses: Any = field(default=None)


@dataclass
class Fit:
    """A captured fit and the oracle's copy of it."""

    module: Any
    trainer: Any
    influence: Any
    data: Any
    queries: Any
    run: Run

    def attributor(self, loss=None, **options):
        about = {"train": self.data, "trajectory": self.influence.trajectory, "trainer": self.trainer, "loss": loss}
        return Attributor(self.module, **about, **options)

    def query_losses(self, module, params):
        module.eval()
        x, y, _ = self.queries.tensors
        return F.cross_entropy(call(module, params, x), y, reduction="none")

    def renormalized(self):
        return dataclasses.replace(self.run, renormalize=True)


class Noisy(Dataset):
    """Draws from every generator that a transform may use, and from torch's for each example."""

    def __init__(self, plain):
        self.plain = plain

    def __len__(self):
        return len(self.plain)

    def __getitem__(self, i):
        x, y, index = self.plain[i]
        scale = random.choice((0.5, 1.0)) + random.gauss(0.0, 0.1) + float(np.random.randn())
        return scale * x + 0.5 * torch.randn_like(x), y, index


def data(net, count, seed, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    if net == "transformer":
        x = torch.randint(7, (count, 3), generator=draw)
    elif net == "cnn":
        x = torch.randn(count, 1, 5, 5, generator=draw, dtype=dtype)[..., :4, :4]
    else:
        x = torch.randn(count, 4, generator=draw, dtype=dtype)
    return TensorDataset(x, torch.randint(3, (count,), generator=draw), torch.arange(count))


def fitted(
    folder,
    net="mlp",
    kind="SGD",
    groups=({},),
    lr=0.1,
    divisor=1,
    clip=None,
    summed=False,
    epochs=2,
    n=N,
    limit=None,
    step=None,
    noisy=False,
    dtype=torch.float64,
    loader=None,
    **capture,
):
    """Fits with capture; batches of 4, the last one short. ``step(net, x, y)`` stands in for the loss.

    ``noisy``: examples look different each time; ``loader``: options of the DataLoader.
    """
    torch.manual_seed(3)
    module = Fitted(NETS[net]().to(dtype), kind, groups, lr, summed, step)
    start = {n: p.detach().clone() for n, p in module.net.named_parameters()}
    train, queries = data(net, n, 0, dtype), data(net, QUERIES, 1, dtype)
    train = Noisy(train) if noisy else train
    untrained = quiet_copy(module)
    influence = Influence(dirpath=folder, **capture)
    options = {"max_epochs": epochs, "callbacks": [influence], "accumulate_grad_batches": divisor}
    if limit is not None:
        options |= {"limit_train_batches": limit}
    if clip is not None:
        options |= {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    trainer = pl.Trainer(**{**QUIET, **options})
    loader = {"batch_size": 4, "shuffle": True, **(loader or {})}
    trainer.fit(module, DataLoader(train, **loader))
    batches = [
        (ids, given, state if net == "dropout" else None)
        for ids, given, state in zip(module.seen, module.given, module.states, strict=True)
    ]
    per_epoch = -(-n // loader["batch_size"])
    windows, rates = [], []
    for epoch in range(epochs):
        of_epoch = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        for first in range(0, per_epoch, divisor):
            windows.append(of_epoch[first : first + divisor])
            rates.append([settings.get("lr", lr) * 0.7**epoch for settings in groups])
    names = list(start)
    divided = (
        [names]
        if len(groups) == 1
        else [
            [n for n in names if not n.endswith("bias")],
            [n for n in names if n.endswith("bias")],
        ]
    )
    settings = [{k: v for k, v in g.items() if k != "lr"} for g in groups]
    twin = copy.deepcopy(untrained.net)
    run = Run(twin, start, windows, rates, list(zip(divided, settings, strict=True)), kind, divisor, not summed, clip)
    run.losses = lambda module, params, batch: F.cross_entropy(
        call(module.train(), params, batch[0]), batch[1], reduction="none"
    )
    return Fit(module, trainer, influence, train, queries, run)
