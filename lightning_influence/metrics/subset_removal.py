"""Loss increase of queries after their strongest proponents are removed and the model is retrained."""

from typing import Any

import torch
from torch import Tensor

from lightning_influence.metrics.paired_metric import PairedMetric, scatter


class SubsetRemoval(PairedMetric):
    """How much worse queries become when their strongest proponents are left out and the model is retrained.

    Source: Bae, Lin, Lorraine, Grosse. Training Data Attribution via Approximate Unrolled Differentiation. NeurIPS
    2024; Ilyas et al., Datamodels. ICML 2022 (data brittleness).

    ``compute`` returns ``increase``, the mean of loss after minus loss before, with its 95 % bootstrap interval over
    queries, and ``share_worse``, the share of queries whose loss rose. The baseline is a second
    metric, updated with random removals of as many examples. ``subset_removal(scores, refit, k)`` makes the losses.

    Args:
        n_bootstrap: bootstrap resamples for the interval; 0: no interval.
        seed: of the resampling.
        kwargs: passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: a negative ``n_bootstrap``; shapes that do not fit.

    Example:
        >>> metric = SubsetRemoval(n_bootstrap=0)
        >>> metric.update(before=torch.tensor([0.5, 1.0]), after=torch.tensor([1.5, 1.0]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'increase': 0.5, 'share_worse': 0.5}
    """

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add some queries.

        Args:
            before: [query] losses of the model trained on everything, or [query, seed].
            after: [query] losses of the models trained without the query's proponents, or [query, seed]; seeds are
                averaged.
        """
        if before.ndim not in (1, 2) or after.ndim not in (1, 2) or len(before) != len(after):
            raise ValueError(
                f"Expected `before` and `after` to be [query] or [query, seed] of the same queries, got "
                f"{list(before.shape)} and {list(after.shape)}."
            )
        self._append(*(part.double().reshape(len(part), -1).mean(1) for part in (before, after)))

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name."""
        before, after = self._pairs()
        found = self._interval("increase", lambda a, b: (b - a).mean(-1), (before, after))
        worse = (after > before).double().masked_fill((after - before).isnan(), torch.nan)
        return found | {"share_worse": worse.mean()}

    def _draw(self, axes: Any) -> None:
        before, after = self._pairs()
        scatter(axes, after, before, ("loss before", "loss after"))
        axes.axline((0, 0), slope=1, color="black", linewidth=0.8)
