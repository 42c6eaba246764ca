"""The linear datamodeling score: do sums of scores predict the losses of models trained on subsets?"""

from typing import Any

import torch
from torch import Tensor

from lightning_influence.metrics.paired_metric import PairedMetric, matrix
from lightning_influence.numerics.statistics import nanmean, pearson, spearman


class LinearDatamodelingScore(PairedMetric):
    r"""Rank correlation between predicted and true query losses over subsets of the training set.

    .. math:: \operatorname{mean}_q \; \rho_S \Big( \sum_{i \in S} s(q, z_i), \; -\ell(w_S, q) \Big)

    Source: Park, Georgiev, Ilyas, Leclerc, Madry. TRAK: Attributing Model Behavior at Scale. ICML 2023.

    ``compute`` returns ``lds`` with the ends ``lds_low``, ``lds_high`` of its 95 % bootstrap interval over subsets and
    queries, ``pearson``, and ``undefined``: the number of queries without a correlation, because their scores or losses
    are the same for all subsets or hold a NaN. They are left out; if all are, the values are NaN. Rank correlations do
    not notice a wrong scale; see ``LeaveOneOutCorrelation`` for that.

    Args:
        n_bootstrap: bootstrap resamples for the interval; 0: no interval.
        seed: of the resampling.
        kwargs: passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: a negative ``n_bootstrap``; shapes that do not fit.

    Example:
        >>> membership = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
        >>> metric = LinearDatamodelingScore(n_bootstrap=0)
        >>> metric.update(torch.tensor([[3.0, 2.0, 1.0]]), membership, losses=torch.tensor([[0.1], [0.2], [0.3]]))
        >>> round(float(metric.compute()["lds"]), 6)
        1.0
    """

    def update(self, scores: Tensor, membership: Tensor, losses: Tensor) -> None:
        """Add some queries.

        Args:
            scores: [query, train], positive for proponents.
            membership: [subset, train], nonzero where an example was trained on; the same subsets in every call.
            losses: [subset, query], of the models trained on those subsets. Of a measurement that is better when high,
                pass the negative.
        """
        scores, losses = matrix("scores", scores), matrix("losses", losses)
        membership = matrix("membership", membership)
        if membership.shape[1] != scores.shape[1] or losses.shape != (len(membership), len(scores)):
            raise ValueError(
                "Expected `membership` [subset, train] and `losses` [subset, query] that fit `scores` [query, train], "
                f"which are {list(scores.shape)}, got {list(membership.shape)} and {list(losses.shape)}."
            )
        self._check_same("subsets", len(membership))
        # A common offset is summed apart, so that constant scores predict exactly the same for subsets of one size.
        common = scores[:, :1]
        mask = membership.ne(0).to(scores)
        self._append((scores - common) @ mask.T + common * mask.sum(1), -losses.T)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name."""
        pairs = self._pairs()
        found = self._interval("lds", lambda a, b: nanmean(spearman(a, b)), pairs, rows=True)
        found["pearson"] = nanmean(pearson(*pairs))
        return found | {"undefined": spearman(*pairs).isnan().sum().double()}

    def per_query(self) -> Tensor:
        """[query]: the rank correlation of each query of this process, in the order of the updates."""
        return spearman(*self._pairs())

    def _draw(self, axes: Any) -> None:
        each = self.per_query()
        known = each[~each.isnan()]
        axes.hist(known, bins=torch.linspace(-1, 1, 41), color="#1b7f5c")
        axes.axvline(0, color="grey", linewidth=0.6)
        if len(known):
            axes.axvline(float(known.mean()), color="black", linewidth=1.2, label=f"mean {float(known.mean()):.2f}")
            axes.legend(frameon=False)
        axes.set_xlabel("rank correlation of a query over subsets")
        axes.set_ylabel("queries")
