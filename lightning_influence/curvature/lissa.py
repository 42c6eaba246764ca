"""Inverse curvature by a Neumann series, whose scale is computed by power iteration."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lightning_influence.checks import check_integer, check_positive
from lightning_influence.curvature.curvature import PreparedCurvature
from lightning_influence.curvature.iterative import Iterative, smallest_entry
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.numerics.solvers import (
    Product,
    Solution,
    Watch,
    accelerated_neumann,
    eigenvalue_bounds,
    largest_eigenvalue,
)
from lightning_influence.setting.setting import Setting
from lightning_influence.wording import counted

# A margin: the power iteration may have stopped at another eigenvalue than the largest. If that is not enough, the
# series diverges, and is summed once more with a bound by Lanczos.
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
        with self._undamped(setting) as undamped:
            largest = largest_eigenvalue(*undamped, self.seed)
        return PreparedCurvature(diagnostics={**super().prepare(setting).diagnostics, "largest_eigenvalue": largest})

    def solve(
        self, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
    ) -> QueryGradients:
        """Sum the series with a separate end for each query; warn if one diverged or did not converge."""
        smallest = smallest_entry(diagonal, self.name, "LiSSA")
        scale = _MARGIN * prepared.diagnostics["largest_eigenvalue"] + float(diagonal.max())
        bounds = setting.state(self, _Bounds).of
        position = setting.task.version
        if position in bounds:
            scale = max(scale, bounds[position][1] + float(diagonal.max()))

        def run(product: Product, right: Tensor, watch: Watch) -> Solution:
            return accelerated_neumann(product, right, smallest, scale, self.tolerance, self.depth, watch)

        solution, directions = self._solved(queries, setting, diagonal, run)
        if solution.stopped:
            return directions
        if float(solution.residuals.max()) > self.tolerance and position not in bounds:
            with self._undamped(setting) as undamped:
                bounds[position] = eigenvalue_bounds(*undamped, self.seed)
            largest = bounds[position][1] + float(diagonal.max())
            if scale < largest < math.inf:
                scale = largest
                solution, directions = self._solved(queries, setting, diagonal, run)
        setting.diagnostic("solver_scale", scale)
        worst = float(solution.residuals.max())
        if bool(solution.diverged.any()):
            least = bounds[position][0] + float(diagonal.min())
            setting.warn(
                f"The Neumann series diverged and was stopped at a residual of {worst:.2g}: with weight decay and "
                f"damping, the {self.name} has eigenvalues from about {least:.3g} to {scale:.3g}, of which the "
                f"smallest has to be at least {smallest:.3g}. {self._way_out(least)}"
            )
        elif worst > self.tolerance:
            setting.warn(
                f"The Neumann series did not converge: residual {worst:.2g} after "
                f"{counted(solution.iterations, 'term')} (tolerance {self.tolerance:.2g}; eigenvalues between "
                f"{smallest:.2g} and {scale:.3g}). Raise `depth=` or `damping=`, or use `ConjugateGradient()`."
            )
        return directions

    def _way_out(self, least: float) -> str:
        """What to do about a series that diverges, given the smallest eigenvalue with weight decay and damping."""
        if self.matrix == "hessian":
            more = f"`damping=` larger by at least {-least:.2g}" if least < 0 else "a larger `damping=`"
            return f"Use `matrix='ggn'`, which has no negative eigenvalues for the usual losses, or {more}."
        return "Use a larger `damping=`, float64 weights (`model.double()`), or `ConjugateGradient()`."


@dataclass
class _Bounds:
    """Bounds of the eigenvalues by Lanczos, where the series did not converge, by the version of the weights."""

    of: dict[int, tuple[float, float]] = field(default_factory=dict)
