"""What the metrics share: pairs of what was said and what came, gathered over updates and processes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_influence.checks import check_integer
from lightning_influence.numerics.statistics import bootstrap


class PairedMetric(Metric):
    """Two states of equal shape, one row or entry for each thing judged, and bootstrap intervals of statistics on them.

    Args:
        n_bootstrap: resamples that an interval is taken from; 0: no interval.
        seed: of the resampling.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: a negative ``n_bootstrap``.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    said: list[Tensor]
    came: list[Tensor]

    def __init__(self, n_bootstrap: int = 500, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("n_bootstrap", n_bootstrap, least=0)
        self.n_bootstrap, self.seed = n_bootstrap, seed
        self.add_state("said", default=[], dist_reduce_fx="cat")
        self.add_state("came", default=[], dist_reduce_fx="cat")

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw what was judged, or values as torchmetrics draws them.

        Args:
            val: results of ``compute`` or ``forward``, one or a list; None: everything that was judged so far.
            ax: matplotlib axes to draw into; None: a figure of its own.

        Returns:
            The figure and its axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if val is not None:
            return self._plot(val, ax)
        figure, axes = _canvas(ax)
        self._draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        return figure, axes

    def _take(self, said: Tensor, came: Tensor) -> None:
        self.said.append(said.detach())
        self.came.append(came.detach())

    def _pairs(self) -> tuple[Tensor, Tensor]:
        return dim_zero_cat(self.said).cpu(), dim_zero_cat(self.came).cpu()

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


def scatter(axes: Any, said: Tensor, came: Tensor, labels: Sequence[str]) -> None:
    """Points of what was said against what came."""
    axes.scatter(came.flatten(), said.flatten(), s=9, alpha=0.5, color="#1b7f5c", linewidths=0)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.axvline(0, color="grey", linewidth=0.6)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])


def matrix(name: str, value: object) -> Tensor:
    """``value``, if it is a matrix of numbers.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has not two dimensions.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `{name}` to be a Tensor, got {type(value).__name__}. For `Scores`, pass `.values`.")
    if value.ndim != 2:
        raise ValueError(f"Expected `{name}` to have two dimensions, got shape {list(value.shape)}.")
    return value.to(torch.float64)


def _canvas(ax: Any) -> tuple[Any, Any]:
    if ax is not None:
        return ax.figure, ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Figures need matplotlib. Run `pip install "lightning-influence[plot]"`, or read `compute()`.'
        ) from error
    figure = Figure(figsize=(5.2, 4.0), layout="constrained", dpi=120)
    return figure, figure.add_subplot()
