"""Summaries of many scores for a tracker: a few numbers, and the distribution."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Table: TypeAlias = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""Names of the columns, and the rows."""

_BLOCK = 1 << 24  # numbers processed at a time; float32 counts are exact up to here
_BINS = 64


class Histogram(NamedTuple):
    """Counts between edges, of which there is one more. `total` and `squares` are sums over the numbers counted."""

    edges: list[float]
    counts: list[int]
    total: float
    squares: float

    @classmethod
    def of(cls, blocks: Sequence[Tensor], bins: int = _BINS) -> "Histogram":
        """Count the finite ones of some numbers.

        Args:
            blocks: The numbers, at most 2^24 per block.
            bins: The number of bins, of equal width from the lowest number to the highest.
        """
        low, high = math.inf, -math.inf
        for block in blocks:
            part = block[block.isfinite()]
            if part.numel():
                low, high = min(low, float(part.min())), max(high, float(part.max()))
        if low > high:  # nothing was finite
            low, high = 0.0, 1.0
        if low == high:
            low, high = low - 0.5, high + 0.5
        counts = torch.zeros(bins, dtype=torch.int64)
        total = squares = 0.0
        for block in blocks:
            part = block[block.isfinite()]
            counts += part.histc(bins, low, high).long()
            total += float(part.sum(dtype=torch.float64))
            squares += float(part.double().square().sum())
        edges = [low + (high - low) * i / bins for i in range(bins)] + [high]
        return cls(edges, counts.tolist(), total, squares)

    def table(self) -> Table:
        """One row per bin, for trackers without histograms."""
        return ("low", "high", "count"), list(zip(self.edges[:-1], self.edges[1:], self.counts, strict=True))


def of_scores(highest: Tensor, values: Tensor | None) -> tuple[dict[str, float], dict[str, Histogram]]:
    """Numbers and histograms about scores.

    Args:
        highest: [query] the highest score of each query. NaN is left out.
        values: [query, train], where all scores were kept.
    """
    scalars, histograms = {}, {}
    known = highest[~highest.isnan()].double()
    if known.numel():
        scalars = {"top_proponent_mean": float(known.mean()), "top_proponent_max": float(known.max())}
    if values is not None:
        blocks = values.split(max(1, _BLOCK // values.shape[1]))
        scalars["opponents_share"] = sum(int((block < 0).sum()) for block in blocks) / values.numel()
        histograms["scores"] = Histogram.of(blocks)
    return scalars, histograms


def of_self_influence(values: Tensor, what: str = "self_influence") -> tuple[dict[str, float], dict[str, Histogram]]:
    """Numbers and histograms about one number for each example, [train]; ``what`` it is, as part of a name."""
    head = what.removesuffix("_influence")
    scalars = {f"{head}_mean": float(values.double().mean()), f"{head}_top": float(values.max())}
    return scalars, {what: Histogram.of(values.split(_BLOCK))}
