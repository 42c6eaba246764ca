"""Steps that read ``batch_idx``, the index of their batch: losses that depend on it, and steps that only report it."""

import functools
import logging
import random

import torch
from case import Case, Step, both, mlp
from torch import nn
from torch.nn import functional as F


def shifted(x, y):
    return torch.stack([x.flip(1), x])[(y % 2)[0]]


class Indexed(Step):
    """The loss of a batch at its index is ``at(self, x, y, batch_idx)``."""

    def __init__(self, at, **modules):
        super().__init__(mlp())
        self.at = at
        for name, module in modules.items():
            setattr(self, name, module)

    def plain(self, x, y):
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.at(self, *batch, batch_idx)


class Generator(Indexed):
    """As a GAN alternates: two networks, of which each batch reaches one."""

    def __init__(self):
        super().__init__(None, other=mlp())

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx % 2 == 0:
            return F.cross_entropy(self.net(x), y)
        return F.mse_loss(self.other(x), x[:, :3])


class Stored(Indexed):
    def training_step(self, batch, batch_idx):
        self.number = batch_idx
        return F.cross_entropy(self(batch[0]), batch[1])

    def forward(self, x):
        return self.net(x) * (1.0 + self.number)


class OtherWord(Indexed):
    def training_step(self, batch, i):
        return self.plain(*batch) * (2.0 if i > 1 else 1.0)


class Stars(Indexed):
    def training_step(self, *args):
        return self.plain(*args[0]) * (1 + args[1])


class AndKeywords(Indexed):
    def training_step(self, batch, batch_idx, **kwargs):
        return self.plain(*batch) * (1 + batch_idx)


class AndLoader(Indexed):
    def training_step(self, batch, batch_idx, dataloader_idx=0):
        assert dataloader_idx == 0
        return self.plain(*batch) * (1 + batch_idx)


def timed(step):
    @functools.wraps(step)
    def wrapper(*args, **kwargs):
        return step(*args, **kwargs)

    return wrapper


class Decorated(Indexed):
    @timed
    def training_step(self, batch, batch_idx):
        return self.plain(*batch) * (1 + batch_idx)


class FromLoop(Indexed):
    """The index is read from the Trainer."""

    def training_step(self, batch):
        return self.plain(*batch) * (1 + self.trainer.fit_loop.batch_idx)


class DeletedName(Indexed):
    def training_step(self, batch, batch_idx):
        del batch_idx
        return self.plain(*batch)


class Summed(Indexed):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum") * (1 + batch_idx)


def penalty(self):
    return sum(p.square().sum() for p in self.net.parameters())


def match_statement(self, x, y, i):
    match i:
        case 0:
            return self.plain(x, y)
        case 1 | 2:
            return self.plain(x.flip(1), y)
    raise AssertionError(i)


def reported(self, x, y, i):
    loss = self.plain(x, y)
    if i % 50 == 0:
        self.log("loss", loss)
        self.log(f"loss_{i}", loss)
        logging.getLogger(__name__).debug("%d of %s: %s", i, {i: "this"}[i], i + 1)
    self.last = i, float(i) / 2, max(i, 1), min(3, i), divmod(i, 2)
    self.log("share", (i + 1) / 3)
    return loss


def seeded(self, x, y, i):
    random.seed(i)
    torch.manual_seed(i)
    return self.plain(x, y)


def only(*indices):
    return lambda self, x, y, i: self.plain(x, y) + (penalty(self) if i in indices else 0.0)


def heads(kind=list):
    three = [nn.Linear(3, 3) for _ in range(3)]
    return nn.ModuleList(three) if kind is list else nn.ModuleDict({f"h{i}": head for i, head in enumerate(three)})


# A loss that depends on the index; TracInCP takes each example at the index of its batch.
DEPENDENT = {
    "alternates between two networks": Generator,
    "alternates between two losses": lambda: Indexed(
        lambda s, x, y, i: s.plain(x, y) if i % 2 else F.mse_loss(s.net(x), F.one_hot(y, 3).to(x))
    ),
    "has a regulariser at every second batch": lambda: Indexed(
        lambda s, x, y, i: s.plain(x, y) + (penalty(s) if i % 2 == 1 else 0.0)
    ),
    "has a term in the first batch only": lambda: Indexed(only(0)),
    "has a term in the last batch only": lambda: Indexed(lambda s, x, y, i: s.plain(x, y) * (3.0 if i == 2 else 1.0)),
    "rises with the index": lambda: Indexed(lambda s, x, y, i: s.plain(x, y) * (i + 1) / 3),
    "rises up to a limit": lambda: Indexed(lambda s, x, y, i: s.plain(x, y) * min(1.0, (i + 1) / 2)),
    "chooses an augmentation": lambda: Indexed(lambda s, x, y, i: s.plain(x.flip(1) if i % 2 else x, y)),
    "chooses a layer of a list": lambda: Indexed(
        lambda s, x, y, i: F.cross_entropy(s.heads[i](s.net(x)), y), heads=heads()
    ),
    "chooses a layer by an f-string": lambda: Indexed(
        lambda s, x, y, i: F.cross_entropy(s.heads[f"h{i}"](s.net(x)), y), heads=heads(dict)
    ),
    "looks up a factor in a dict": lambda: Indexed(lambda s, x, y, i: s.plain(x, y) * {0: 1.0}.get(i, 2.0)),
    "looks up a factor in a tuple": lambda: Indexed(lambda s, x, y, i: s.plain(x, y) * (1.0, 1.0, 0.5)[i]),
    "takes the index as a tensor": lambda: Indexed(lambda s, x, y, i: s.plain(x, y) * torch.tensor(i + 1.0)),
    "multiplies a tensor by the index": lambda: Indexed(lambda s, x, y, i: (s.plain(x, y) * i) + s.plain(x.flip(1), y)),
    "rolls its input by the index": lambda: Indexed(lambda s, x, y, i: s.plain(torch.roll(x, i, 1), y)),
    "matches the index": lambda: Indexed(match_statement),
    "has the index in a set": lambda: Indexed(lambda s, x, y, i: s.plain(x, y) * (1.0 if i in {0, 2} else 0.3)),
    "draws numbers seeded by the index": lambda: Indexed(
        lambda s, x, y, i: s.plain(x * (1 + random.Random(int(i)).random()), y)
    ),
    "keeps the index as an attribute": lambda: Stored(None),
    "calls the index otherwise": lambda: OtherWord(None),
    "takes star arguments": lambda: Stars(None),
    "takes keywords too": lambda: AndKeywords(None),
    "takes the index of the loader too": lambda: AndLoader(None),
    "is decorated": lambda: Decorated(None),
    "reads the index from the Trainer": lambda: FromLoop(None),
}

# The index changes nothing that is trained on.
INDEPENDENT = {
    "only reports the index": lambda: Indexed(reported),
    "only passes the index on": lambda: Indexed(lambda s, x, y, i: s.plain(x, y)),
    "deletes the index": lambda: DeletedName(None),
    "seeds a generator that nothing draws from": lambda: Indexed(seeded),
    "adds the index, which has no gradient": lambda: Indexed(lambda s, x, y, i: s.plain(x, y) + i),
    "adds a term of zero": lambda: Indexed(lambda s, x, y, i: s.plain(x, y) + 0.0 * i),
}

INDEX = [
    *(
        Case(f"batch_idx: the step {name}", make, **both(5), fit=True, by_index=True)
        for name, make in DEPENDENT.items()
    ),
    Case("batch_idx: a sum that rises with it", lambda: Summed(None), **both(5), fit=True, by_index=True, summed=True),
    *(Case(f"batch_idx: the step {name}", make, **both(5), fit=True) for name, make in INDEPENDENT.items()),
    Case(
        "batch_idx: a loss that depends on it, without a fit",
        lambda: Indexed(lambda s, x, y, i: s.plain(x, y) * (i + 1)),
        **both(5),
        expected="refused",
        says=("does not depend on `batch_idx` for `GradientDot`", "`batch_idx=", "pass `loss=`"),
        way_out=lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1], reduction="none"),
    ),
]
