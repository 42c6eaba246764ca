"""The arguments of `Influence` that its parts need, without the callback itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_influence.attribution.attributor import Attributor
from lightning_influence.methods.method import Method
from lightning_influence.methods.plain_loss import LABELS
from lightning_influence.module.task import Loss
from lightning_influence.trajectory import Trajectory

LEAST_SECONDS = 60.0
"""By default, what takes less is started after any fit, however short."""


@dataclass(frozen=True)
class ScoringPlan:
    """What to score when a fit ends, and what to track for it during the fit.

    Fields are the arguments of `Influence` with the same names, checked, and `least_seconds`: work of less time is
    never refused when the fit has ended.
    """

    methods: Mapping[str, Method]
    queries: Any
    parameters: Sequence[str] | None
    loss: Loss | None
    top_k: int | None
    self_influence: bool
    labels: bool
    max_cost: float
    least_seconds: float
    album: Mapping[str, Any]
    log_scores: bool
    verbose: bool
    lookup: Callable[[int], Any] | None
    precision: str | None
    sample_id: str | Callable[[Any], Any] | None

    def limit(self, fit_seconds: float) -> float:
        """The most seconds that one method may take after a fit of this duration."""
        return max(self.max_cost * fit_seconds, self.least_seconds)

    @property
    def names(self) -> list[str]:
        """Of all that is scored."""
        return [*self.methods, *([LABELS] if self.labels else [])]

    def attributor(self, module: Any, trainer: Any, trajectory: Trajectory | None = None) -> Attributor:
        """Return what scores the examples of the training loader."""
        options = {name: getattr(self, name) for name in ("loss", "parameters", "lookup", "precision")}
        return Attributor(module, trainer.train_dataloader, trajectory, trainer, **options)
