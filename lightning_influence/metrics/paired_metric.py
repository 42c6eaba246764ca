"""The base of the metrics: pairs of predicted and observed values, gathered over updates and processes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_influence.checks import check_integer
from lightning_influence.numerics.statistics import bootstrap
from lightning_influence.plotting.style import blank


class PairedMetric(Metric):
    """Two states of equal shape, one row or entry per query or example, and bootstrap intervals of their statistics.

    Args:
        n_bootstrap: bootstrap resamples per interval; 0: no intervals.
        seed: of the resampling.
        kwargs: passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: a negative ``n_bootstrap``.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    predicted: list[Tensor]
    observed: list[Tensor]

    def __init__(self, n_bootstrap: int = 500, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("n_bootstrap", n_bootstrap, least=0)
        self.n_bootstrap, self.seed = n_bootstrap, seed
        self.add_state("predicted", default=[], dist_reduce_fx="cat")
        self.add_state("observed", default=[], dist_reduce_fx="cat")

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw the pairs, or given values as torchmetrics does.

        Args:
            val: results of ``compute`` or ``forward``, one or a list; None: draw all pairs so far.
            ax: matplotlib axes to draw into; None: a new figure.

        Returns:
            The figure and its axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if val is not None:
            return self._plot(val, ax)
        axes = blank(5.2, 4.0, "read `compute()`")[0].add_subplot() if ax is None else ax
        self._draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        return axes.figure, axes

    def _check_same(self, what: str, count: int) -> None:
        if self.predicted and self.predicted[0].shape[1] != count:
            raise ValueError(
                f"Expected the {self.predicted[0].shape[1]} {what} of earlier calls, got {count}. "
                f"Pass the same {what} and other queries in every call."
            )

    def _append(self, predicted: Tensor, observed: Tensor) -> None:
        self.predicted.append(predicted.detach())
        self.observed.append(observed.detach())

    def _pairs(self) -> tuple[Tensor, Tensor]:
        return dim_zero_cat(self.predicted).cpu(), dim_zero_cat(self.observed).cpu()

    def _interval(
        self, name: str, statistic: Callable[..., Tensor], data: tuple[Tensor, ...], rows: bool = False
    ) -> dict[str, Tensor]:
        """A statistic and the ends of its 95 % interval."""
        found = {name: statistic(*data).double()}
        if self.n_bootstrap:
            low, high = bootstrap(statistic, data, self.n_bootstrap, self.seed, rows)
            found |= {f"{name}_low": low, f"{name}_high": high}
        return found

    def _draw(self, axes: Any) -> None:
        raise NotImplementedError


def scatter(axes: Any, predicted: Tensor, observed: Tensor, labels: Sequence[str]) -> None:
    """Predicted values over observed ones, as points."""
    axes.scatter(observed.flatten(), predicted.flatten(), s=9, alpha=0.5, color="#1b7f5c", linewidths=0)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.axvline(0, color="grey", linewidth=0.6)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])


def matrix(name: str, value: object) -> Tensor:
    """``value`` in float64, if it is a matrix.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it does not have two dimensions.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `{name}` to be a Tensor, got {type(value).__name__}. For `Scores`, pass `.values`.")
    if value.ndim != 2:
        raise ValueError(f"Expected `{name}` to have two dimensions, got shape {list(value.shape)}.")
    return value.to(torch.float64)
