"""Rank statistics along the last dimension, with bootstrap intervals; an undefined statistic is NaN, never 0."""

from collections.abc import Callable

import torch
from torch import Tensor

# The most numbers in the resamples of one round of the bootstrap.
_ROUND = 2**22


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 to n; ties get the mean of their ranks. A row with a NaN is all NaN."""
    ordered = values.sort(-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    upto = torch.searchsorted(ordered, values, right=True)
    mean = (below + upto + 1).to(torch.float64) / 2
    return mean.masked_fill(values.isnan().any(-1, keepdim=True), torch.nan)


def pearson(left: Tensor, right: Tensor) -> Tensor:
    """Pearson correlation of two tensors of the same shape; NaN where one of them is constant."""
    left, right = left.double(), right.double()
    left_part, right_part = left - left.mean(-1, keepdim=True), right - right.mean(-1, keepdim=True)
    product = (left_part * right_part).mean(-1)
    found = product / (left_part.square().mean(-1) * right_part.square().mean(-1)).sqrt()
    # Rounding errors in the mean give a constant tiny deviations, whose correlation would be arbitrary.
    constant = (left == left[..., :1]).all(-1) | (right == right[..., :1]).all(-1)
    return found.clamp(-1.0, 1.0).masked_fill(constant, torch.nan)


def spearman(left: Tensor, right: Tensor) -> Tensor:
    """Spearman rank correlation; NaN where one of them is constant."""
    return pearson(ranks(left), ranks(right))


def slope(predicted: Tensor, actual: Tensor) -> Tensor:
    """Least-squares slope of ``predicted`` against ``actual``, over all rows at once, each centred at its own mean.

    Rows with NaN are left out; the slope is NaN where no row of ``actual`` varies.
    """
    predicted, actual = predicted.double(), actual.double()
    whole = (predicted.isfinite() & actual.isfinite()).all(-1)[..., None]
    predicted = torch.where(whole, predicted - predicted.mean(-1, keepdim=True), 0.0)
    actual = torch.where(whole, actual - actual.mean(-1, keepdim=True), 0.0)
    return (predicted * actual).sum((-1, -2)) / actual.square().sum((-1, -2))


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """Probability that a positive scores above a negative, ties counting half; NaN where either kind is missing."""
    n_positive = positive.sum(-1).double()
    n_other = positive.shape[-1] - n_positive
    above = (ranks(scores) * positive).sum(-1) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_other)


def average_precision(scores: Tensor, positive: Tensor) -> Tensor:
    """Mean over the positives of the precision among all scores at least as high; NaN without positives."""
    descending, order = scores.sort(-1, descending=True)
    found = positive.gather(-1, order).double().cumsum(-1)
    # Equal scores are indistinguishable: each counts all of its ties.
    last = torch.searchsorted(-descending, -descending, right=True) - 1
    precision = found.gather(-1, last) / (last + 1)
    return (precision * positive.gather(-1, order)).sum(-1) / positive.sum(-1)


def recall_at(scores: Tensor, positive: Tensor, fraction: float) -> Tensor:
    """Fraction of the positives among the highest ``fraction`` of scores, in expectation over the order of ties."""
    return _found(scores, positive, fraction) / positive.sum(-1)


def precision_at(scores: Tensor, positive: Tensor, fraction: float) -> Tensor:
    """Fraction of positives among the highest ``fraction`` of scores, in expectation over the order of ties."""
    return _found(scores, positive, fraction) / _inspected(scores, fraction)


def _inspected(scores: Tensor, fraction: float) -> int:
    return max(1, round(fraction * scores.shape[-1]))


def _found(scores: Tensor, positive: Tensor, fraction: float) -> Tensor:
    """How many positives are among the highest ``fraction`` of scores."""
    inspected = _inspected(scores, fraction)
    descending, order = scores.sort(-1, descending=True)
    first = torch.searchsorted(-descending, -descending, right=False)
    beyond = torch.searchsorted(-descending, -descending, right=True)
    chance = ((inspected - first).clamp(min=0).double() / (beyond - first)).clamp(max=1.0)
    return (chance * positive.gather(-1, order)).sum(-1)


def nanmean(values: Tensor) -> Tensor:
    """Mean along the last dimension, without NaN; NaN where all values are."""
    return values.nanmean(-1)


def bootstrap(
    statistic: Callable[..., Tensor], data: tuple[Tensor, ...], n: int, seed: int, rows: bool
) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap interval of a statistic, resampling columns and, with ``rows``, rows.

    Args:
        statistic: called with each of ``data`` resampled, [resample, ..., column]; returns [resample].
        data: tensors [row, column] or [column], resampled together.
        n: number of resamples.
        seed: of the resampling.
        rows: whether to resample the rows too.

    Returns:
        The ends that enclose 95 % of the resamples; NaN if the statistic is NaN in half of them or more.
    """
    return interval(resampled(statistic, data, n, seed, rows))


def resampled(statistic: Callable[..., Tensor], data: tuple[Tensor, ...], n: int, seed: int, rows: bool) -> Tensor:
    """A statistic of each bootstrap resample, [resample] or whatever it returns for each; see ``bootstrap``."""
    draw = torch.Generator().manual_seed(seed)
    *front, width = data[0].shape
    each = max(1, data[0].numel())
    found = []
    while n > 0:
        count = min(n, max(1, _ROUND // each))
        columns = torch.randint(width, (count, *[1] * len(front), width), generator=draw)
        if rows and front:
            chosen = torch.randint(front[0], (count, front[0]), generator=draw)
            picked = [part[chosen] for part in data]
        else:
            picked = [part.expand(count, *part.shape) for part in data]
        found.append(statistic(*(part.gather(-1, columns.expand(part.shape)) for part in picked)))
        n -= count
    return torch.cat(found)


def interval(values: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The quantiles of resampled values, [resample], that enclose ``level`` of them; NaN if half or more are NaN."""
    known = values[~values.isnan()]
    if len(known) * 2 <= len(values):
        return torch.tensor(torch.nan, dtype=torch.float64), torch.tensor(torch.nan, dtype=torch.float64)
    ends = torch.quantile(known.double(), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return ends[0], ends[1]
