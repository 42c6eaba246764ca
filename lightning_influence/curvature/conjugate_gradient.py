"""Inverse curvature by conjugate gradients, for all queries of a block at once."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_influence.checks import check_integer, check_positive
from lightning_influence.curvature.curvature import PreparedCurvature
from lightning_influence.curvature.iterative import Iterative
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.numerics.solvers import Product, Solution, Watch, conjugate_gradient
from lightning_influence.setting.setting import Setting
from lightning_influence.wording import counted


@dataclass(frozen=True)
class ConjugateGradient(Iterative):
    r"""The inverse curvature of the whole training set, applied by conjugate gradients to a given residual.

    .. math:: (C + D)\,x = q

    is solved for each query's gradient q, with C the Gauss-Newton matrix or the Hessian of the mean training loss and
    D the damping and weight decay.

    Source: Hestenes, Stiefel. Methods of Conjugate Gradients for Solving Linear Systems. 1952; as used by Martens,
    Deep Learning via Hessian-free Optimization, ICML 2010.
    Cost: one product with the curvature per iteration, about three passes over the training data for each query.

    Args:
        damping: added to the diagonal, in units of the curvature; None chooses it from the fit (see ``Curvature``).
        matrix: solve with the Gauss-Newton matrix (``"ggn"``) or the Hessian (``"hessian"``).
        seed: of the random probes that estimate the mean eigenvalue.
        tolerance: stop when the residual is at most this times the query's gradient, in norm.
        max_iterations: the most iterations per query; if they do not reach the tolerance, a warning and the notes
            give the residual.

    Raises:
        ValueError: an argument is out of range; C + D is not positive definite (with ``matrix="hessian"``).
    """

    tolerance: float = 1e-5
    max_iterations: int = 1000

    unprepared: ClassVar[frozenset[str]] = frozenset({"damping", "tolerance", "max_iterations"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tolerance", self.tolerance)
        check_integer("max_iterations", self.max_iterations)

    def solve(
        self, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
    ) -> QueryGradients:
        """Run conjugate gradients with separate step sizes and a separate end for each query.

        Raises:
            ValueError: C + D is not positive definite.
        """

        def run(product: Product, right: Tensor, watch: Watch) -> Solution:
            return conjugate_gradient(product, right, self.tolerance, self.max_iterations, watch)

        solution, directions = self._solved(queries, setting, diagonal, run)
        if bool(solution.indefinite.any()):
            raise ValueError(
                f"Expected a positive definite curvature, got a {self.name} that is singular or has a negative "
                f"eigenvalue, with weight decay + damping = {float(diagonal.min()):.3g}. Pass a larger `damping=`, or "
                + ("`matrix='ggn'`." if self.matrix == "hessian" else "use float64 weights (`model.double()`).")
            )
        worst = float(solution.residuals.max())
        if (
            worst > 10 * self.tolerance and not solution.stopped
        ):  # rounding errors keep the true residual above the recursive one
            setting.warn(
                f"Conjugate gradients did not converge: residual {worst:.2g} after "
                f"{counted(solution.iterations, 'iteration')} (tolerance {self.tolerance:.2g}). Raise "
                "`max_iterations=` or `damping=`, or use float64 weights."
            )
        return directions
