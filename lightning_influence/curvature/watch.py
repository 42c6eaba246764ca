"""Shows how far an iterative solver is, and stops it at the limit of time."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_influence.setting.setting import Setting
from lightning_influence.wording import counted

PARTS = 100
"""Of the way to the tolerance, in logarithms of the residual."""
# With a larger residual, what was found is no answer.
_USEFUL = 0.5
GO_ON = (
    "To go on, raise `Influence(max_cost=)` or `Attributor.limit_seconds`, or use fewer queries, a larger `damping=` "
    "or `EKFAC()`."
)


class OutOfTime(RuntimeError):
    """A solver reached the limit of time before it had found anything of use."""


class SolverWatch:
    """Called after each iteration of a solver with the relative residuals, [vector].

    Args:
        setting: has the limit of time.
        tolerance: the residual at which the solver is done.
        done: called with the parts of the way that were just made.
    """

    def __init__(self, setting: Setting, tolerance: float, done: Callable[[int], Any]) -> None:
        self._setting, self._tolerance, self._done, self._made = setting, tolerance, done, 0
        self.stopped = False

    def __call__(self, residuals: Tensor) -> bool:
        """Whether to stop."""
        worst = float(residuals.max())
        if worst < 1:
            way = 1.0 if worst <= self._tolerance else math.log(worst) / math.log(self._tolerance)
            parts = int(PARTS * min(1.0, way))
            self._done(max(0, parts - self._made))
            self._made = max(self._made, parts)
        self.stopped = self._setting.late and worst > self._tolerance
        return self.stopped

    def refuse(self, name: str, residual: float, iterations: int) -> None:
        """Raise OutOfTime if the solver was stopped before its solution is of any use."""
        if self.stopped and not residual <= _USEFUL:
            raise OutOfTime(
                f"Expected `{name}` to solve within the limit of time, got a residual of {residual:.2g} after "
                f"{counted(iterations, 'iteration')}. {GO_ON}"
            )
