"""An inverse by conjugate gradients, for all queries of a block side by side."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from lightning_influence.checks import check_integer, check_positive
from lightning_influence.curvature.curvature import Prepared
from lightning_influence.curvature.iterative import Iterative, tell
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.numerics.solvers import conjugate_gradient
from lightning_influence.setting.setting import Setting


@dataclass(frozen=True)
class ConjugateGradient(Iterative):
    """Solves with the Gauss-Newton matrix or the Hessian over the whole training set, to a residual of one's choice.

    Source: Hestenes, Stiefel. Methods of Conjugate Gradients for Solving Linear Systems. 1952; as used by Martens,
    Deep Learning via Hessian-free Optimization, ICML 2010.
    Cost: one product with the curvature (about three passes over the training set a query) each iteration.

    Args:
        damping: see ``Curvature``.
        matrix: ``"ggn"`` or ``"hessian"``.
        seed: of the probes for the mean eigenvalue.
        tolerance: residual relative to the query's gradient at which to stop.
        max_iterations: more are not made; a warning then says how far it came.

    Raises:
        ValueError: other values; a direction of negative curvature (with ``matrix="hessian"``).
    """

    tolerance: float = 1e-5
    max_iterations: int = 1000

    unprepared: ClassVar[frozenset[str]] = frozenset({"damping", "tolerance", "max_iterations"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tolerance", self.tolerance)
        check_integer("max_iterations", self.max_iterations)

    def solve(self, prepared: Prepared, queries: QueryGradients, setting: Setting, diagonal: Tensor) -> QueryGradients:
        """Each query takes its own steps and stops on its own."""
        run = partial(conjugate_gradient, tolerance=self.tolerance, max_iterations=self.max_iterations)
        solution, directions = self._solved(queries, setting, diagonal, run)
        if bool(solution.indefinite.any()):
            raise ValueError(
                f"Expected a positive definite curvature, got a {self.name} that bends the other way or is singular "
                f"along a direction, with weight decay + damping = {float(diagonal.min()):.3g}. Pass a larger "
                "`damping=`, or `matrix='ggn'`."
            )
        worst = float(solution.residuals.max())
        if worst > 10 * self.tolerance:  # rounding keeps the true residual above the running one
            tell(
                setting,
                f"Conjugate gradients did not converge: residual {worst:.2g} after {solution.iterations} iterations, "
                f"asked for {self.tolerance:.2g}. Raise `max_iterations=` or `damping=`, or use float64 weights.",
            )
        return directions
