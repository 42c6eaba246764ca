"""Correlation and slope of scores against measured leave-one-out loss changes."""

from typing import Any

from torch import Tensor

from lightning_influence.metrics.paired_metric import PairedMetric, matrix, scatter
from lightning_influence.numerics.statistics import nanmean, pearson, slope, spearman


class LeaveOneOutCorrelation(PairedMetric):
    """Correlation of scores with measured loss changes from leaving examples out, and the slope between them.

    Source: Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017.

    ``compute`` returns ``pearson`` and ``spearman`` (means over queries, with 95 % bootstrap intervals over examples
    and queries), ``slope`` of predicted over observed changes (1: the scale is right; over all queries at once, each
    centred at its own mean), and ``undefined``: the number of queries without a correlation, which are left out.

    Args:
        n_bootstrap: bootstrap resamples per interval; 0: no intervals.
        seed: of the resampling.
        kwargs: passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: a negative ``n_bootstrap``; shapes or ids that do not fit.

    Example:
        >>> import torch
        >>> metric = LeaveOneOutCorrelation(n_bootstrap=0)
        >>> metric.update(torch.tensor([[0.5, 9.0, 1.0, 1.5]]), torch.tensor([[1.0, 2.0, 3.0]]), ids=[0, 2, 3])
        >>> {name: round(float(value), 6) for name, value in metric.compute().items()}
        {'pearson': 1.0, 'spearman': 1.0, 'slope': 0.5, 'undefined': 0.0}
    """

    def update(self, scores: Tensor, changes: Tensor, ids: Any = None) -> None:
        """Add some queries.

        Args:
            scores: [query, train], positive for proponents.
            changes: [query, chosen]: loss without the example minus loss with it (``LeaveOneOut`` estimates these).
            ids: the columns of ``scores`` that match those of ``changes``; None: all.
        """
        scores, changes = matrix("scores", scores), matrix("changes", changes)
        chosen = scores if ids is None else scores[:, list(ids)]
        if chosen.shape != changes.shape:
            raise ValueError(
                f"Expected `changes` to be [query, chosen] = {list(chosen.shape)}, got {list(changes.shape)}. "
                "Pass the `ids` of the training examples that were left out."
            )
        self._check_same("examples", chosen.shape[1])
        self._append(chosen, changes)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name."""
        pairs = self._pairs()
        found = self._interval("pearson", lambda a, b: nanmean(pearson(a, b)), pairs, rows=True)
        found |= self._interval("spearman", lambda a, b: nanmean(spearman(a, b)), pairs, rows=True)
        return found | {"slope": slope(*pairs), "undefined": pearson(*pairs).isnan().sum().double()}

    def _draw(self, axes: Any) -> None:
        scatter(axes, *self._pairs(), ("loss change when left out", "score"))
