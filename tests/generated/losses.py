"""Losses of the generator: what ``training_step`` does with outputs and labels, and which labels it takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

CLASSES = 3
WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


@dataclass(frozen=True)
class Loss:
    """A loss.

    Args:
        of: (module, output, pooled features, labels) -> scalar.
        kind: the output and its labels: "row" [B, C] and [B], "token" [B, T, C] and [B, T], "pair" [B, 2] and [B, 2],
            "number" [B, 1] and [B].
        ignores: whether it can leave labels out (-100 or NaN).
        share: (labels of one, labels of its batch) -> the weight of the one in the batch's loss, where that is
            neither the mean, the sum nor the share of labels.
        each: per-example losses (module, batch) -> [batch], passed as ``loss=``.
        ordinary: an ordinary loss: to refuse it is a fault too.
    """

    of: Callable
    kind: str = "row"
    ignores: bool = False
    share: Callable | None = None
    each: Callable | None = None
    ordinary: bool = False


def of_rows(reduce):
    """Cross entropy with the given arguments; the padding label is -100."""
    return lambda m, z, f, y: reduce(z, y)


def token_mean(m, z, f, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def mean_of_token_means(m, z, f, y):
    each = F.cross_entropy(z.transpose(1, 2), y, reduction="none")
    return (each.sum(1) / (y != -100).sum(1).clamp(min=1)).mean()


def masked_mean(m, z, f, y):
    known = ~y.isnan()
    return (((z - y.nan_to_num()) ** 2) * known).sum() / known.sum()


def selected_mean(m, z, f, y):
    known = ~y.isnan()
    return F.mse_loss(z[known], y[known])


def masked_sum(m, z, f, y):
    known = ~y.isnan()
    return F.binary_cross_entropy_with_logits(z, (y.nan_to_num() > 0).to(z), known.to(z), reduction="sum") / len(y)


def contrastive(m, z, f, y):
    unit = F.normalize(z, dim=1)
    pairs = unit @ unit.roll(1, 1).T / 0.5
    return F.cross_entropy(pairs, torch.arange(len(z)))


def penalised(m, z, f, y):
    return F.cross_entropy(z, y) + 0.01 * sum(p.square().sum() for p in m.parameters() if p.requires_grad)


def weighted_each(module, batch):
    """What `loss=` is given: the same losses as the step's, one by one."""
    z, _ = module.outputs(batch)
    z = z.reshape(len(batch["y"]), -1)
    return F.cross_entropy(z, batch["y"], reduction="none") * WEIGHTS[batch["y"].clamp(min=0)]


def class_share(one, batch):
    w = WEIGHTS * torch.ones(CLASSES, dtype=torch.float64)
    total = w[batch[batch != -100]].sum()
    return float(w[one[one != -100]].sum() / total) if total > 0 else 0.0


def is_class(y):
    return y.clamp(min=0)


LOSSES = {
    "ce": Loss(of_rows(F.cross_entropy), ignores=True, ordinary=True),
    "ce sum": Loss(of_rows(lambda z, y: F.cross_entropy(z, y, reduction="sum")), ignores=True, ordinary=True),
    "class weights": Loss(of_rows(lambda z, y: F.cross_entropy(z, y, WEIGHTS)), ignores=True, share=class_share),
    "label smoothing": Loss(of_rows(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)), ordinary=True),
    "token mean": Loss(token_mean, "token", ignores=True),
    "mean of token means": Loss(mean_of_token_means, "token", ignores=True, ordinary=True),
    "masked mean": Loss(masked_mean, "pair", ignores=True),
    "selected mean": Loss(selected_mean, "pair", ignores=True),
    "bce over masked labels": Loss(masked_sum, "pair", ignores=True, ordinary=True),
    "mse": Loss(lambda m, z, f, y: F.mse_loss(z.squeeze(-1), y), "number", ordinary=True),
    "mse broadcasts": Loss(lambda m, z, f, y: ((z - y) ** 2).mean(), "number"),
    "bce": Loss(lambda m, z, f, y: F.binary_cross_entropy_with_logits(z, (y > 0).to(z)), "pair", ordinary=True),
    "penalty": Loss(penalised, ordinary=True),
    "contrastive": Loss(contrastive),
    "loss=": Loss(
        of_rows(lambda z, y: (F.cross_entropy(z, y, reduction="none") * WEIGHTS[y]).mean()), each=weighted_each
    ),
}
