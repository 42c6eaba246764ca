"""Several methods evaluated on the same retrained models, with intervals of the differences between them."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.numerics.statistics import interval, nanmean, pearson, ranks, resampled

_MEANINGS = {
    "lds": "lds: the rank correlation between predicted losses and those of models retrained on subsets (0: random).",
    "spearman": "spearman: the rank correlation of scores with changes of the loss without each example (0: random).",
}
_TITLES = {"undefined": "queries left out"}
_LEFT_OUT = "queries left out: those whose predicted or real losses are all alike have no correlation."
# Resamples of the differences: twice those of the metrics, since an interval for several differences is wider.
_RESAMPLES = 1000


@dataclass(frozen=True)
class Evaluation:
    """Metrics of scores beside those of baselines; ``print`` shows them as a table.

    Args:
        metrics: values by name, and the ends of their 95 % intervals as ``name_low`` and ``name_high``.
        baselines: the same metrics for what needs no scores: ``random``, and ``plain loss`` for wrong labels.
        ceiling: the highest rank correlation that any estimate can be expected to reach, since the truth itself is an
            average over a few seeds; 1 where seeds make no difference; NaN where there is only one seed.
        notes: what a reader of the metrics must know.
    """

    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]]
    ceiling: float
    notes: tuple[str, ...] = field(default=())

    @property
    def main(self) -> str:
        """The name of the metric that methods are compared by: ``"lds"``, or ``"spearman"`` for leave-one-out."""
        return "lds" if "lds" in self.metrics else "spearman"

    @property
    def beats_random(self) -> bool:
        """Whether the whole interval of the main metric is above the random baseline's value."""
        return self.metrics[f"{self.main}_low"] > self.baselines["random"][self.main]

    def __repr__(self) -> str:
        columns = {"scores": self.metrics, **self.baselines}
        rows = [["", *columns]]
        rows += [
            [_TITLES.get(name, name), *(_cell(name, column) for column in columns.values())]
            for name in _shown(self.metrics)
        ]
        return "\n".join([*_aligned(rows, [20] + [22] * len(columns)), *_closing(self)])


@dataclass(frozen=True)
class Difference:
    """By how much a method is behind the best one, in the main metric, and the ends of the interval of that.

    Args:
        value: the best method's metric minus this one's, as a mean over the queries for which both are defined.
        low: the lower end; see ``Comparison``.
        high: the upper end.
    """

    value: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0. False says that this bank cannot tell the two apart, not that they agree."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Evaluations of several methods on the same retrained models; ``print`` shows one table.

    The differences are paired: both methods are evaluated on the same resamples of the bank's subsets (or of the
    examples that were left out) and queries. What they have in common cancels, so that they may be distinguishable
    where the intervals of their metrics overlap. The intervals hold for all differences together with 95 %
    (Bonferroni).

    Args:
        evaluations: by name, the best first; those without a defined metric last.
        differences: of the other methods from the best one, by name.
    """

    evaluations: dict[str, Evaluation]
    differences: dict[str, Difference]

    @property
    def best(self) -> str | None:
        """The method with the highest ``lds`` or, for leave-one-out, ``spearman``; None if it is undefined for all."""
        name, found = next(iter(self.evaluations.items()))
        return None if math.isnan(found.metrics[found.main]) else name

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Each method's metrics, by name."""
        return {name: found.metrics for name, found in self.evaluations.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the metrics must know."""
        return next(iter(self.evaluations.values())).notes

    def __repr__(self) -> str:
        first = next(iter(self.evaluations.values()))
        others = [name for name in _shown(first.metrics) if name != first.main]
        paired = self.best is not None and bool(self.differences)
        rows = [["", first.main, *([f"behind {self.best}", "distinguishable"] if paired else []), *others]]
        rows[0] = [_TITLES.get(name, name) for name in rows[0]]
        for name, column in (self.metrics | first.baselines).items():
            beside = _behind_cells(self.differences.get(name)) if paired else []
            rows.append([name, _cell(first.main, column), *beside, *(_cell(other, column) for other in others)])
        rows = [[" ".join(cell.split()) for cell in row] for row in rows]
        widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
        return "\n".join([*_aligned(rows, widths), *self._legend(first.main), *_closing(*self.evaluations.values())])

    def _legend(self, main: str) -> list[str]:
        if self.best is None or not self.differences:
            return []
        count = len(self.differences)
        return [
            f"behind: the difference in {main}, on the same resamples for both methods, with "
            f"{'a 95 % interval' if count == 1 else f'intervals that hold for all {count} together with 95 %'}.",
            "distinguishable: whether the interval excludes 0. Where not, more subsets or queries may tell.",
        ]


def compare(
    evaluations: dict[str, Evaluation], predicted: dict[str, Tensor], observed: Tensor, seed: int
) -> Comparison:
    """Sort methods by their main metric and find how far they are behind the best.

    Args:
        evaluations: by name, at least one.
        predicted: what each method predicts, [query, subset or example].
        observed: what happened, in the same order.
        seed: of the resampling.
    """

    def height(name: str) -> float:
        value = evaluations[name].metrics[evaluations[name].main]
        return math.inf if math.isnan(value) else -value

    names = sorted(evaluations, key=height)
    evaluations = {name: evaluations[name] for name in names}
    if height(names[0]) == math.inf:
        return Comparison(evaluations, {})
    data = (observed, *(predicted[name] for name in names))
    values = resampled(_behind, data, _RESAMPLES, seed, rows=True)
    level = 1 - 0.05 / max(1, len(names) - 1)
    found = {}
    for name, value, column in zip(names[1:], _behind(*data).tolist(), values.T, strict=True):
        found[name] = Difference(value, *(float(end) for end in interval(column, level)))
    return Comparison(evaluations, found)


def _behind(observed: Tensor, best: Tensor, *others: Tensor) -> Tensor:
    """By how much the mean rank correlation of the others is lower than that of the best, [..., other]."""
    truth = ranks(observed)
    highest = pearson(ranks(best), truth)
    behind = [nanmean(highest - pearson(ranks(other), truth)) for other in others]
    return torch.stack(behind, -1) if behind else highest.new_zeros(*highest.shape[:-1], 0)


def _shown(metrics: dict[str, float]) -> list[str]:
    """Those with a column of their own; the recall of wrong labels follows from their precision."""
    return [name for name in metrics if not (name.endswith(("_low", "_high")) or name.startswith("recall_at_"))]


def _cell(name: str, column: dict[str, float]) -> str:
    if name not in column:
        return ""
    value = f"{column[name]:.0f}" if name == "undefined" else f"{column[name]:.3f}"
    if f"{name}_low" not in column:
        return value
    return f"{value} [{column[f'{name}_low']:.2f}, {column[f'{name}_high']:.2f}]"


def _behind_cells(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["", ""]
    if math.isnan(difference.low):
        return ["", "unknown"]
    text = f"{difference.value:.3f} [{difference.low:.3f}, {difference.high:.3f}]"
    return [text, "yes" if difference.distinguishable else "no"]


def _aligned(rows: list[list[Any]], widths: list[int]) -> list[str]:
    """Lines with the first column to the left, the others to the right."""
    return [
        f"{row[0]:{widths[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _closing(found: Evaluation, *others: Evaluation) -> list[str]:
    left_out = any(one.metrics.get("undefined") for one in (found, *others))
    ceiling = f"noise ceiling of rank correlations: {found.ceiling:.2f}"
    return [_MEANINGS[found.main], *([_LEFT_OUT] if left_out else []), ceiling, *found.notes]
