"""Hypergradients without the Hessian: one coefficient per visit where the optimizer permits, otherwise vectors."""

from collections.abc import Sequence
from typing import Any

from lightning_influence.setting.setting import Queries
from lightning_influence.tracking.hypergradients import Hypergradients
from lightning_influence.tracking.micro_batch import TrackedMicroBatch
from lightning_influence.tracking.tracker import TrackedFit, TrackedStep, Tracker, TrackerState, TrackingPlan
from lightning_influence.tracking.visits import Visits


class FastHyDRA(Tracker):
    """Chooses between ``Visits`` and ``Hypergradients`` once the optimizer is known.

    Args:
        examples: ids to track; None: all.
        memory: bytes to keep in memory at most.
    """

    def __init__(self, examples: Sequence[int] | None, memory: int) -> None:
        self._examples, self._memory = examples, memory
        self._inner: Tracker = Visits(memory)

    def starts(self, fit: TrackedFit, state: TrackerState | None) -> TrackingPlan:
        """Choose, and start the tracker chosen."""
        if not fit.uniform:
            self._inner = Hypergradients(False, self._examples, self._memory)
        return self._inner.starts(fit, state)

    def batch(self, present: TrackedMicroBatch) -> Any:
        """See the tracker chosen."""
        return self._inner.batch(present)

    def stepped(self, step: TrackedStep, queries: Queries | None) -> None:
        """See the tracker chosen."""
        self._inner.stepped(step, queries)

    def state(self) -> TrackerState:
        """See the tracker chosen."""
        return self._inner.state()

    def close(self) -> None:
        """See the tracker chosen."""
        self._inner.close()
