"""Do scores tell what leaving single examples out did, in rank, in proportion and in size?"""

from typing import Any

from torch import Tensor

from lightning_influence.metrics.paired_metric import PairedMetric, matrix, scatter
from lightning_influence.numerics.statistics import nanmean, pearson, slope, spearman


class LeaveOneOutCorrelation(PairedMetric):
    """Correlation of scores with the loss changes that leaving examples out truly made, and the slope between them.

    Source: Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017.

    ``compute`` gives ``pearson`` and ``spearman`` (means over queries, with 95 % bootstrap intervals over examples and
    queries), ``slope`` of what was predicted against what came (1: the scale is right; over all queries at once, each
    around its own mean), and ``undefined``: queries without a correlation, which do not count.

    Args:
        n_bootstrap: resamples that the intervals are taken from; 0: no interval.
        seed: of the resampling.
        kwargs: of ``torchmetrics.Metric``.

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
        """Take in some queries.

        Args:
            scores: [query, train], positive for proponents.
            changes: [query, chosen]: loss without the example less loss with it (``LeaveOneOut`` gives these).
            ids: columns of ``scores`` that stand beside those of ``changes``; None: all.
        """
        scores, changes = matrix("scores", scores), matrix("changes", changes)
        chosen = scores if ids is None else scores[:, list(ids)]
        if chosen.shape != changes.shape:
            raise ValueError(
                f"Expected `changes` to be [query, chosen] = {list(chosen.shape)}, got {list(changes.shape)}. "
                "Pass the `ids` of the training examples that were left out."
            )
        if self.said and self.said[0].shape[1] != chosen.shape[1]:
            raise ValueError(
                f"Expected the {self.said[0].shape[1]} examples of the calls before, got {chosen.shape[1]}. "
                "Give every call the same examples and other queries."
            )
        self._take(chosen, changes)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name."""
        pairs = self._pairs()
        found = self._interval("pearson", lambda a, b: nanmean(pearson(a, b)), pairs, rows=True)
        found |= self._interval("spearman", lambda a, b: nanmean(spearman(a, b)), pairs, rows=True)
        return found | {"slope": slope(*pairs), "undefined": pearson(*pairs).isnan().sum().double()}

    def _draw(self, axes: Any) -> None:
        said, came = self._pairs()
        scatter(axes, said, came, ("loss change when left out", "score"))
