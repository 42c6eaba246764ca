"""Odd but ordinary: batches that are objects, weights of several types, losses of unusual forms, and their refusals."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from case import Case, Items, Step, both, drawn, inputs, mlp
from cases_batches import batches
from cases_losses import WAY_OUT, each, per_sample, step_with
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

# ---- batches that are objects ----


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


class Encoding(dict):
    """A dict with attributes and ``.to``, as tokenisers return."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, device, **options):
        return Encoding({key: value.to(device) for key, value in self.items()})


class Moved:
    """A plain object that moves itself."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device, **options):
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


class Row(tuple):
    __slots__ = ()
    x = property(lambda self: self[0])
    y = property(lambda self: self[1])


class ByAttribute(Step):
    def training_step(self, batch, batch_idx):
        return self.loss(self(batch.x), batch.y)


class WritesByAttribute(ByAttribute):
    """Scales its input in place: the next pass must not see it."""

    def training_step(self, batch, batch_idx):
        batch.x *= 0.5
        return self.loss(self(torch.as_tensor(batch.x)), batch.y)


class OneByOne(Step):
    """The batch is the list of its examples."""

    def training_step(self, batch, batch_idx):
        return sum(self.loss(self(x)[None], y[None]) for x, y in batch) / len(batch)


class Names(Step):
    """Labels are words."""

    def training_step(self, batch, batch_idx):
        y = torch.tensor(["abc".index(name) for name in batch["label"]])
        return self.loss(self(batch["x"]), y)


class Bytes(Step):
    """Images of bytes, scaled on their way to the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].double().div(255), batch[1]


def collated(kind):
    return lambda items: kind(*default_collate(items))


def object_batches(name, kind, step=ByAttribute):
    return Case(f"batches as {name}", lambda: step(mlp()), **both(5), collate=collated(kind), fit=True)


def masked(x, y):
    return Encoding(x=x * (torch.rand(x.shape) > 0.3), y=y)


def encoded(items):
    x, y = default_collate(items)
    return Encoding(x=x, y=y)


# ---- weights ----


class TwoTypes(nn.Module):
    """The last layer in float64, for the sake of its loss."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3).double()

    def forward(self, x):
        return self.last(self.first(x).tanh().double())


class Autocast(Step):
    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.autocast("cpu", torch.bfloat16):
            out = self.net(x)
        return self.loss(out.float(), y)


class InContainers(nn.Module):
    def __init__(self):
        super().__init__()
        g = drawn(4)
        self.layers = nn.ParameterList([torch.randn(5, 6, generator=g), torch.zeros(6)])
        self.heads = nn.ParameterDict({"main": torch.randn(6, 3, generator=g), "unused": torch.zeros(2)})

    def forward(self, x):
        return (x @ self.layers[0] + self.layers[1]).tanh() @ self.heads["main"]


class Spectrum(nn.Module):
    """Complex numbers inside and in a buffer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.register_buffer("phase", torch.polar(torch.ones(3), torch.arange(3.0)).to(torch.complex128))

    def forward(self, x):
        z = torch.fft.rfft(x) * self.phase
        return self.head(torch.cat([z.real, z.imag], 1))


def old_weight_norm():
    net = mlp()
    torch.nn.utils.weight_norm(net[0])
    return Step(net)


def old_spectral_norm():
    net = mlp()
    torch.nn.utils.spectral_norm(net[0])
    return Step(net)


# ---- losses ----


class Triplets(Step):
    def training_step(self, batch, batch_idx):
        return F.triplet_margin_loss(*map(self, batch))


class Uncertain(Step):
    """Losses of two tasks, weighted by trained variances."""

    def __init__(self):
        super().__init__(mlp())
        self.other, self.scales = nn.Linear(5, 1), nn.Parameter(torch.zeros(2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = torch.stack([F.cross_entropy(self(x), y), F.mse_loss(self.other(x)[:, 0], x[:, 0])])
        total = (losses * torch.exp(-self.scales)).sum() + self.scales.sum()
        self.log_dict({"first": losses[0], "second": losses[1]}, on_epoch=True)
        return {"loss": total, "parts": losses.detach()}


class HiddenTeacher(Step):
    """A frozen teacher that is no submodule."""

    def __init__(self):
        super().__init__(mlp())
        self.teacher = [mlp().double().requires_grad_(False)]

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.teacher[0](batch[0]).softmax(1)
        return F.kl_div(self(batch[0]).log_softmax(1), target, reduction="batchmean")


class Weighted(Step):
    """Each example has a weight, and the mean is over examples."""

    def training_step(self, batch, batch_idx):
        x, y, weight = batch
        return (weight * F.cross_entropy(self(x), y, reduction="none")).mean()


class Penalty(Step):
    """A sum over examples, and a penalty that counts once a batch."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        penalty = sum(p.square().sum() for p in self.parameters())
        return F.cross_entropy(self(x), y, reduction="sum") + 0.01 * penalty


class MeanPenalty(Step):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y) + 0.01 * sum(p.abs().sum() for p in self.parameters())


class MixUp(Step):
    def training_step(self, batch, batch_idx):
        x, y = batch
        order = torch.randperm(len(x))
        out = self(0.7 * x + 0.3 * x[order])
        return 0.7 * self.loss(out, y) + 0.3 * self.loss(out, y[order])


class MixUpInTraining(MixUp):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if self.training else Step.training_step(self, batch, batch_idx)


class Sampled(Step):
    """A code that is drawn in eval mode as well."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        return self.loss(out + 0.3 * torch.randn_like(out), y)


class NoisyHook(Step):
    """An augmentation on the device that asks the Trainer, which is in training, and not the module."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 0.3 * torch.randn_like(batch[0]), batch[1]


def focal(out, y, reduction="mean"):
    losses = F.cross_entropy(out, y, reduction="none")
    losses = (1 - torch.exp(-losses)) ** 2 * losses
    return losses.mean() if reduction == "mean" else losses


def likelihood(out, y):
    scale = F.softplus(out[:, 1]) + 0.1
    return -torch.distributions.Normal(out[:, 0], scale).log_prob(y).mean()


def root(out, y):
    return F.mse_loss(out[:, 0], y).sqrt()


def dice(out, y):
    """An overlap of the whole batch."""
    p, y = out.softmax(1), F.one_hot(y, 3)
    return 1 - 2 * (p * y).sum() / (p.square().sum() + y.sum())


def correlation(out, y):
    p, y = out[:, 0] - out[:, 0].mean(), y - y.mean()
    return 1 - (p * y).sum() / (p.norm() * y.norm() + 1e-8)


def triplets(n, seed):
    return lambda: Items(list(zip(*torch.randn(3, n, 5, generator=drawn(seed), dtype=torch.float64), strict=True)))


def images(n, seed):
    def make():
        g = drawn(seed)
        x = torch.randint(256, (n, 5), generator=g, dtype=torch.uint8)
        return Items(list(zip(x, torch.randint(3, (n,), generator=g), strict=True)))

    return make


def whole_batches(n, seed):
    """Each item is a batch already."""
    return lambda: Items([default_collate(inputs(5, n=4, seed=seed + i)().items) for i in range(n)])


def refused(name, make, *says, way_out=None, **data):
    return Case(name, make, **(data or both(5)), expected="refused", says=says, way_out=way_out)


CROSS_ENTROPY = each(F.cross_entropy)
ODD = [
    object_batches("named tuples", Pair),
    object_batches("dataclasses", Record),
    object_batches("objects with .to", Moved),
    object_batches("a subclass of tuple", lambda *parts: Row(parts)),
    object_batches("dataclasses that the step writes into", Record, WritesByAttribute),
    object_batches("objects that the step writes into", lambda x, y: SimpleNamespace(x=x, y=y), WritesByAttribute),
    object_batches(
        "arrays that the step writes into", lambda x, y: SimpleNamespace(x=x.numpy(), y=y), WritesByAttribute
    ),
    Case(
        "encodings that are masked at random",
        lambda: ByAttribute(mlp()),
        **both(5),
        collate=collated(masked),
        expected="refused",
        says=("one that draws random numbers", "whose `collate_fn` only stacks"),
    ),
    Case("batches as encodings with .to", lambda: ByAttribute(mlp()), **both(5), collate=encoded, fit=True),
    Case("batches as lists of examples", lambda: OneByOne(mlp()), **both(5), collate=list, fit=True),
    batches("labels that are words", lambda: Names(mlp()), lambda x, y, i: {"x": x, "label": "abc"[int(y)]}, fit=True),
    batches("labels as probabilities", lambda: Step(mlp()), lambda x, y, i: (x, F.one_hot(y, 3).double()), fit=True),
    batches(
        "targets that are booleans",
        step_with(lambda out, y: F.binary_cross_entropy_with_logits(out, y.to(out)), mlp),
        lambda x, y, i: (x, torch.arange(3) == y),
    ),
    Case("images of bytes, scaled in a hook", lambda: Bytes(mlp()), images(8, 1), images(4, 2), fit=True),
    batches("a weight for each example", lambda: Weighted(mlp()), lambda x, y, i: (x, y, 0.5 + i % 3), fit=True),
    Case("weights of two precisions", lambda: Step(TwoTypes()), **both(5, dtype=torch.float32), dtype=torch.float32),
    Case(
        "autocast inside the step",
        lambda: Autocast(mlp()),
        **both(5, dtype=torch.float32),
        dtype=torch.float32,
        alone=CROSS_ENTROPY,
        fit=True,
    ),
    Case("parameters in lists and dicts", lambda: Step(InContainers()), **both(5)),
    Case("complex numbers inside", lambda: Step(Spectrum()), **both(5)),
    Case("weight norm as hooks", old_weight_norm, **both(5)),
    Case("spectral norm as hooks", old_spectral_norm, **both(5)),
    Case("triplets", lambda: Triplets(mlp()), triplets(8, 1), triplets(4, 2), fit=True),
    Case("tasks weighted by trained variances", Uncertain, **both(5), fit=True),
    Case("a teacher that is no submodule", HiddenTeacher, **both(5)),
    Case("focal loss", step_with(focal), **both(5), fit=True),
    Case("a likelihood with its own variance", step_with(likelihood), **both(5, target="number")),
    Case("absolute values of all weights in the loss", lambda: MeanPenalty(mlp()), **both(5)),
    Case("MixUp in the step, in training only", lambda: MixUpInTraining(mlp()), **both(5), fit=True),
    refused("MixUp in the step", lambda: MixUp(mlp()), "random", "if self.training", *WAY_OUT, way_out=CROSS_ENTROPY),
    refused("a sampled code", lambda: Sampled(mlp()), "random", "VAE", *WAY_OUT, way_out=CROSS_ENTROPY),
    refused("a hook that draws", lambda: NoisyHook(mlp()), "hooks of the batch transfer", "self.training"),
    refused(
        "a penalty beside a sum",
        lambda: Penalty(mlp()),
        "counts once a batch",
        "penalty",
        *WAY_OUT,
        way_out=CROSS_ENTROPY,
    ),
    refused(
        "root of the mean squared error",
        step_with(root),
        "RMSE",
        *WAY_OUT,
        way_out=per_sample(lambda out, y: (out[:, 0] - y).square()),
        **both(5, target="number"),
    ),
    refused("Dice loss of the whole batch", step_with(dice), "mixes examples", *WAY_OUT, way_out=CROSS_ENTROPY),
    refused(
        "a correlation over the batch",
        step_with(correlation),
        "mixes examples",
        *WAY_OUT,
        way_out=per_sample(lambda out, y: (out[:, 0] - y).square()),
        **both(5, target="number"),
    ),
    refused(
        "a batch size in a view",
        step_with(lambda out, y: F.cross_entropy(out.view(8, 3), y)),
        "Expected `training_step` to run in eval mode on a batch of one",
        "shape '[8, 3]' is invalid",
        *WAY_OUT,
        way_out=CROSS_ENTROPY,
    ),
    Case(
        "a dataset of whole batches",
        lambda: Step(mlp()),
        whole_batches(4, 1),
        whole_batches(2, 9),
        expected="refused",
        says=("Expected `training_step` to run in eval mode on a batch of one", "RuntimeError", *WAY_OUT),
    ),
]
