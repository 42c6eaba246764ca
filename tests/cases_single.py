"""Steps that fail on a batch of one or in eval mode, and losses and collate functions that mix examples by mistake."""

import torch
from case import Case, Step, both, inputs, mlp
from cases_losses import WAY_OUT, each, per_sample, step_with
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate


def squeezed(loss, **options):
    """The loss of an output without any dimension of size one."""
    return lambda out, y: loss(out.squeeze(), y, **options)


def column(loss):
    """Per-sample losses of an output [batch, 1]."""
    return per_sample(lambda out, y: loss(out.squeeze(1), y, reduction="none"))


def one_output():
    return mlp(classes=1)


def flat():
    """A time dimension of one that vanishes together with that of a batch of one."""
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.LSTM(5, 3, batch_first=True), _First(), nn.Linear(3, 3))


class _First(nn.Module):
    def forward(self, x):
        return x[0].squeeze()


class TrainOnly(Step):
    """Returns its loss in train mode only, as detectors do; in eval mode predictions, nothing, or an error."""

    def __init__(self, otherwise):
        super().__init__(mlp())
        self.otherwise = otherwise

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        return F.cross_entropy(out, y) if self.training else self.otherwise(out, y)


def _fails(out, y):
    raise RuntimeError("no targets in eval mode")


SQUEEZED = {
    "binary cross entropy": (F.binary_cross_entropy_with_logits, "binary", one_output),
    "squared error": (F.mse_loss, "number", one_output),
    "Huber loss": (F.huber_loss, "number", one_output),
    "cross entropy": (F.cross_entropy, "class", mlp),
}
TRAIN_ONLY = {
    "a list": lambda out, y: [{"boxes": row} for row in out],
    "predictions": lambda out, y: out.argmax(1),
    "nothing": lambda out, y: None,
    "an error": _fails,
    "a dict of losses": lambda out, y: {"classification": F.cross_entropy(out, y)},
}


def _centred(items):
    x, y = default_collate(items)
    return x - x.mean(0), y


def _cutmix(items):
    x, y = default_collate(items)
    x[:, :2] = x.flip(0)[:, :2]
    return x, y


def _mixup(items):
    x, y = default_collate(items)
    share = torch.rand(1, dtype=x.dtype)
    return share * x + (1 - share) * x[torch.randperm(len(x))], y


def _masked(items):
    x, y = default_collate(items)
    return x.masked_fill(torch.rand(x.shape) < 0.3, 0), y


COLLATE = {"centres": _centred, "cuts and mixes": _cutmix, "mixes at random": _mixup, "masks at random": _masked}
SINGLE = [
    *(
        Case(
            f"{name} of a squeezed output{' (sum)' if total else ''}",
            step_with(squeezed(loss, reduction="sum" if total else "mean"), net),
            **both(5, target=target),
            alone=column(loss) if net is one_output else each(loss),
            fit=True,
            summed=total,
        )
        for name, (loss, target, net) in SQUEEZED.items()
        for total in (False, True)
    ),
    Case(
        "squeezed output inside loss=",
        step_with(F.cross_entropy, one_output),
        **both(5, target="binary"),
        loss=per_sample(squeezed(F.binary_cross_entropy_with_logits, reduction="none")),
        alone=column(F.binary_cross_entropy_with_logits),
    ),
    Case(
        "a net that squeezes inside",
        step_with(F.cross_entropy, flat),
        **both(5),
        alone=per_sample(lambda out, y: F.cross_entropy(out.reshape(-1, 3), y, reduction="none")),
    ),
    *(
        Case(
            f"in eval mode the step returns {name}",
            lambda otherwise=otherwise: TrainOnly(otherwise),
            **both(5),
            expected="refused",
            says=("in eval mode", "in train mode only", *WAY_OUT),
            way_out=each(F.cross_entropy),
        )
        for name, otherwise in TRAIN_ONLY.items()
        if name != "predictions"
    ),
    *(
        Case(
            f"[batch, 1] against [batch] in {name}",
            step_with(loss, one_output),
            **both(5, target="number"),
            expected="refused",
            says=("broadcasts to pairs of all examples", "squeeze(1)"),
            way_out=column(F.mse_loss),
        )
        for name, loss in {
            "the squared error": F.mse_loss,
            "the absolute error": F.l1_loss,
            "a difference": lambda out, y: (out - y).square().mean(),
            "a product": lambda out, y: (1 - out * y).square().mean(),
        }.items()
    ),
    *(
        Case(
            f"a collate function that {name}",
            step_with(F.cross_entropy),
            **both(5),
            collate=collate,
            expected="refused",
            says=("`collate_fn`", "random" if "random" in name else "changes an example by the others", "only stacks"),
        )
        for name, collate in COLLATE.items()
    ),
    Case(
        "functional dropout that ignores eval mode",
        step_with(lambda out, y: F.cross_entropy(F.dropout(out, 0.5), y)),
        inputs(5, n=20),
        inputs(5, n=4, seed=2),
        expected="refused",
        says=("random numbers in eval mode", *WAY_OUT),
        way_out=each(F.cross_entropy),
    ),
]
