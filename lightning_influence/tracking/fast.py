"""Hypergradients without the Hessian: as numbers for each visit where the optimizer allows, else as vectors."""

from collections.abc import Sequence
from typing import Any

from lightning_influence.setting import Queries
from lightning_influence.tracking.hypergradients import Hypergradients
from lightning_influence.tracking.present import Present
from lightning_influence.tracking.tracker import Fit, Plan, State, Step, Tracker
from lightning_influence.tracking.visits import Visits


class Fast(Tracker):
    """Decides when the optimizer is known.

    Args:
        examples: ids to track; None: all.
        memory: bytes that may stay in memory.
    """

    def __init__(self, examples: Sequence[int] | None, memory: int) -> None:
        self._examples, self._memory = examples, memory
        self._inner: Tracker = Visits(memory)

    def starts(self, fit: Fit, state: State | None) -> Plan:
        """See ``Visits`` and ``Hypergradients``."""
        if not fit.uniform:
            self._inner = Hypergradients(False, self._examples, self._memory)
        return self._inner.starts(fit, state)

    def batch(self, present: Present) -> Any:
        """Forward."""
        return self._inner.batch(present)

    def stepped(self, step: Step, queries: Queries | None) -> None:
        """Forward."""
        self._inner.stepped(step, queries)

    def state(self) -> State:
        """Forward."""
        return self._inner.state()

    def close(self) -> None:
        """Forward."""
        self._inner.close()
