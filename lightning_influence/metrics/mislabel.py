"""Detection of wrong labels by scores."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.metrics.paired_metric import PairedMetric
from lightning_influence.numerics.statistics import auroc, average_precision, precision_at, recall_at


class MislabelDetection(PairedMetric):
    """How high wrong labels rank among training examples sorted by suspicion.

    ``compute`` returns ``auroc`` (ties count half), ``average_precision``, each with its 95 % bootstrap interval over
    examples, and for each fraction F of the training set, the most suspicious ones, ``precision_at_F``: the share of
    them that is wrong, and ``recall_at_F``: the share of all wrong labels that is among them. The baseline to beat is
    the mean loss over checkpoints: ``attributor.losses(checkpoints="all").values``.

    Source: Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017, section 5.4, where
    labels are checked in the order of self-influence.

    Args:
        fractions: shares of the training set that would be reviewed.
        n_bootstrap: bootstrap resamples per interval; 0: no intervals.
        seed: of the resampling.
        kwargs: passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: a fraction outside (0, 1]; shapes that do not fit; suspicions that are not finite.

    Example:
        >>> metric = MislabelDetection(fractions=(0.5,), n_bootstrap=0)
        >>> metric.update(torch.tensor([0.1, 3.0, 0.2, 0.3]), torch.tensor([False, True, False, True]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'auroc': 1.0, 'average_precision': 1.0, 'precision_at_0.5': 1.0, 'recall_at_0.5': 1.0}
    """

    def __init__(
        self, fractions: Sequence[float] = (0.01, 0.05, 0.1, 0.2), n_bootstrap: int = 500, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(n_bootstrap, seed, **kwargs)
        wrong = [f for f in fractions if not 0 < f <= 1]
        if wrong:
            raise ValueError(f"Expected `fractions` above 0 and up to 1, got {wrong!r}.")
        self.fractions = tuple(fractions)

    def update(self, suspicion: Tensor, mislabelled: Tensor) -> None:
        """Add some training examples.

        Args:
            suspicion: [train], high for labels that look wrong: self-influence, the loss, or the negative influence
                on clean queries.
            mislabelled: [train], nonzero for wrong labels.
        """
        if suspicion.ndim != 1 or suspicion.shape != mislabelled.shape:
            raise ValueError(
                f"Expected `suspicion` and `mislabelled` to be both [train], got {list(suspicion.shape)} and "
                f"{list(mislabelled.shape)}."
            )
        unknown = int((~suspicion.isfinite()).sum())
        if unknown:
            raise ValueError(f"Expected finite `suspicion`, got NaN or infinity for {unknown} of {len(suspicion)}.")
        self._append(suspicion, mislabelled.ne(0))

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name."""
        pairs = self._pairs()
        found = self._interval("auroc", auroc, pairs)
        found |= self._interval("average_precision", average_precision, pairs)
        for fraction in self.fractions:
            found[f"precision_at_{fraction:g}"] = precision_at(*pairs, fraction)
            found[f"recall_at_{fraction:g}"] = recall_at(*pairs, fraction)
        return found

    def _draw(self, axes: Any) -> None:
        pairs = self._pairs()
        fractions = torch.linspace(0.005, 1, 200)
        axes.plot(fractions, [float(recall_at(*pairs, fraction)) for fraction in fractions.tolist()], color="#1b7f5c")
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":", label="random order")
        axes.set_xlabel("fraction of the training set reviewed")
        axes.set_ylabel("share of the wrong labels found")
        axes.legend(frameon=False)
