"""Inverse curvature by a Neumann series, whose scale is computed by power iteration."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_influence.checks import check_integer, check_positive
from lightning_influence.curvature.curvature import PreparedCurvature
from lightning_influence.curvature.iterative import Iterative, smallest_entry
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.numerics.solvers import Product, Solution, accelerated_neumann, largest_eigenvalue
from lightning_influence.setting.setting import Setting

# A safety margin: the power iteration may have stopped at another eigenvalue than the largest.
_MARGIN = 1.05


@dataclass(frozen=True)
class LiSSA(Iterative):
    r"""The inverse curvature as a Neumann series, with a scale from power iteration.

    .. math:: A^{-1} q = \frac{1}{s} \sum_k (I - A / s)^k q

    with A the curvature C plus damping and weight decay, and s an upper bound of its eigenvalues. ``damping`` is in
    units of C; published code that adds it to C / s instead damps by s times as much.

    Source: Agarwal, Bullins, Hazan. Second-Order Stochastic Optimization for Machine Learning in Linear Time.
    JMLR 2017; for influence functions Koh and Liang, ICML 2017.
    Cost: one product with the curvature per term, about three passes over the training data for each query.
    Departs from the paper: products over all training data instead of samples, so that two calls agree; Chebyshev
    weights, with which the square root of the terms is enough; a stop at a given residual.

    Args:
        damping: added to the diagonal, in units of the curvature; None chooses it from the fit (see ``Curvature``).
        matrix: invert the Gauss-Newton matrix (``"ggn"``) or the Hessian (``"hessian"``).
        seed: of the power iteration and of the random probes that estimate the mean eigenvalue.
        depth: the most terms of the series.
        tolerance: stop when the residual is at most this times the query's gradient, in norm.

    Raises:
        ValueError: an argument is out of range; weight decay + damping is 0.
    """

    depth: int = 2000
    tolerance: float = 1e-4

    unprepared: ClassVar[frozenset[str]] = frozenset({"damping", "depth", "tolerance"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tolerance", self.tolerance)
        check_integer("depth", self.depth)

    def prepare(self, setting: Setting) -> PreparedCurvature:
        """The mean and the largest eigenvalue."""
        largest = largest_eigenvalue(*self._undamped(setting), self.seed)
        return PreparedCurvature(diagnostics={**super().prepare(setting).diagnostics, "largest_eigenvalue": largest})

    def solve(
        self, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
    ) -> QueryGradients:
        """Sum the series with a separate end for each query; warn if one diverged or did not converge."""
        smallest = smallest_entry(diagonal, self.name, "LiSSA")
        scale = _MARGIN * prepared.diagnostics["largest_eigenvalue"] + float(diagonal.max())
        setting.diagnostic("solver_scale", scale)

        def run(product: Product, right: Tensor) -> Solution:
            return accelerated_neumann(product, right, smallest, scale, self.tolerance, self.depth)

        solution, directions = self._solved(queries, setting, diagonal, run)
        worst = float(solution.residuals.max())
        if bool(solution.diverged.any()):
            setting.warn(
                f"The Neumann series diverged and was stopped at a residual of {worst:.2g}: the {self.name} has "
                f"eigenvalues outside the interval from 0 to {scale:.3g}. Use `matrix='ggn'` or a larger `damping=`."
            )
        elif worst > self.tolerance:
            setting.warn(
                f"The Neumann series did not converge: residual {worst:.2g} after {solution.iterations} terms "
                f"(tolerance {self.tolerance:.2g}; eigenvalues between {smallest:.2g} and {scale:.3g}). Raise `depth=` "
                "or `damping=`, or use `ConjugateGradient()`."
            )
        return directions
