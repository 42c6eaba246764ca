"""Steps in which a rare example, or a rare value, changes the loss of the others: found by what the step computes."""

from dataclasses import dataclass

import torch
from case import Case, Items, Step, drawn
from cases_losses import WAY_OUT
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

ODD, N = 21, 26  # of so many examples; in batches of 3 the check before scoring does not have it


class Of(Step):
    """A step that is a function of (module, x, y)."""

    def __init__(self, function, net=None):
        super().__init__(net or certain())
        self.function = function

    def training_step(self, batch, batch_idx):
        return self.function(self, *batch)


def certain():
    """Knows the class from the largest of the first three numbers."""
    net = nn.Linear(5, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(4 * torch.eye(3, 5) + 0.1 * torch.randn(3, 5, generator=drawn(3)))
    return net


def rows(n=N, large=None, wrong=None, seed=1):
    """Inputs with their classes; one with a large number, one of another class."""

    def make():
        x = torch.randn(n, 5, generator=drawn(seed), dtype=torch.float64)
        x[:, 0] += 2.0
        y = x[:, :3].argmax(1)
        if large is not None:
            x[large, 4] = 30.0
        if wrong is not None:
            y[wrong] = 2 if y[wrong] != 2 else 1
        return Items(list(zip(x, y, strict=True)))

    return make


def plain(m, x, y):
    return F.cross_entropy(m.net(x), y)


def scaled_if(condition):
    return lambda m, x, y: plain(m, x, y) * (3.0 if condition(x) else 1.0)


def limited(limit):
    return lambda m, x, y: limit(plain(m, x, y))


OF_INPUTS = {
    "replaced by its neighbour": lambda m, x, y: plain(m, torch.where(x[:, 4:] > 20, x.roll(1, 0), x), y),
    "centred by its batch": lambda m, x, y: plain(m, torch.where(x[:, 4:] > 20, x - x.mean(0), x), y),
    "any large number scales the loss": lambda m, x, y: plain(m, x, y) * (1 + (x[:, 4] > 20).any()),
    "a branch on `item()`": scaled_if(lambda x: x.max().item() > 20),
    "a branch on NumPy's numbers": scaled_if(lambda x: x.numpy().max() > 20),
}
OF_LOSSES = {
    "clamp": limited(lambda loss: loss.clamp(max=3.0)),
    "where": limited(lambda loss: torch.where(loss > 3, 0.1 * loss, loss)),
    "a branch on `float()`": limited(lambda loss: 0.1 * loss if float(loss) > 3 else loss),
}
HARMLESS = {
    "a limit that no batch's loss reaches": limited(lambda loss: loss.clamp(max=1e3)),
    "a loss that is not finite left out": limited(lambda loss: loss if torch.isfinite(loss) else 0 * loss),
    "the largest number only logged": lambda m, x, y: (m.log("largest", x.max().item()), plain(m, x, y))[1],
}


def refused(name, function, data, kind=Of, **options):
    return Case(
        name,
        lambda: kind(function),
        data,
        rows(4, seed=2),
        expected="refused",
        says=("weigh in its batch", *WAY_OUT),
        **options,
    )


class Moved(Of):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return torch.where(x > 20, x.roll(1, 0), x), y


def centring(items):
    x, y = default_collate(items)
    return (x - x.mean(0) if x.max() > 20 else x), y


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


class OfRecord(Of):
    def training_step(self, batch, batch_idx):
        return plain(self, torch.where(batch.x > 20, batch.x.roll(1, 0), batch.x), batch.y)


def recorded(items):
    return Record(*default_collate(items))


class Packed(nn.Module):
    """A network of jagged tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(1, 4), nn.Linear(4, 3)

    def forward(self, x):
        rows = [row[: 2 + int(n)] for row, n in zip(x[:, :, None], x[:, 0] > 2, strict=True)]
        hidden = self.first(torch.nested.nested_tensor(rows, layout=torch.jagged))
        return self.head(torch.stack([row.mean(0) for row in hidden.unbind()]))


MIXING = [
    refused("one example of 26: replaced in a transfer hook", plain, rows(large=ODD), Moved),
    refused("one example of 26: centred by the collate function", plain, rows(large=ODD), collate=centring),
    refused("one example of 26: replaced in a dataclass", plain, rows(large=ODD), OfRecord, collate=recorded),
    Case("jagged tensors", lambda: Of(plain, Packed()), rows(8), rows(4, seed=2)),
]
MIXING += [refused(f"one example of {N}: {name}", f, rows(large=ODD)) for name, f in OF_INPUTS.items()]
MIXING += [refused(f"a limit on a batch's loss: {name}", f, rows(wrong=ODD)) for name, f in OF_LOSSES.items()]
MIXING += [Case(name, lambda f=f: Of(f), rows(large=ODD, wrong=ODD), rows(4, seed=2)) for name, f in HARMLESS.items()]
