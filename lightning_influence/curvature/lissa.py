"""An inverse by a Neumann series whose scale is found, not guessed."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_influence.checks import check_integer, check_positive
from lightning_influence.curvature.curvature import Prepared
from lightning_influence.curvature.iterative import Iterative, smallest_added, tell
from lightning_influence.gradients.products import Products
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.numerics.solvers import Product, Solution, accelerated_neumann, largest_eigenvalue
from lightning_influence.setting.setting import Setting

# The power iteration may have stopped at another eigenvalue than the largest.
_MARGIN = 1.05


@dataclass(frozen=True)
class LiSSA(Iterative):
    r"""The Neumann series of the inverse, with its scale from a power iteration.

    .. math:: A^{-1} q = \frac{1}{s} \sum_k (I - A / s)^k q

    ``damping`` is in units of the curvature; public code divides it by nothing and so damps by damping times scale.

    Source: Agarwal, Bullins, Hazan. Second-Order Stochastic Optimization for Machine Learning in Linear Time.
    JMLR 2017; for influence functions Koh and Liang, ICML 2017.
    Cost: one product with the curvature over the whole training set each iteration.
    Departs from the paper: products over all the data instead of samples, so that two calls agree; Chebyshev's weights
    for the terms, which take the square root of the iterations; stops at a residual.

    Args:
        damping: see ``Curvature``.
        matrix: ``"ggn"`` or ``"hessian"``.
        seed: of the power iteration and of the probes for the mean eigenvalue.
        depth: terms at most.
        tolerance: residual relative to the query's gradient at which to stop.

    Raises:
        ValueError: other values; weight decay + damping of 0.
    """

    depth: int = 2000
    tolerance: float = 1e-4

    unprepared: ClassVar[frozenset[str]] = frozenset({"damping", "depth", "tolerance"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tolerance", self.tolerance)
        check_integer("depth", self.depth)

    def prepare(self, setting: Setting) -> Prepared:
        """The largest eigenvalue too."""
        products = Products(setting.engine, setting.examples)
        like = products.like.detach().new_zeros(len(products.flat))
        largest = largest_eigenvalue(self._bare(products), like, self.seed)
        return Prepared(figures={**super().prepare(setting).figures, "largest_eigenvalue": largest})

    def solve(self, prepared: Prepared, queries: QueryGradients, setting: Setting, diagonal: Tensor) -> QueryGradients:
        """Each query stops on its own; what does not converge is told, what diverges is stopped."""
        smallest = smallest_added(diagonal, self.name, "LiSSA")
        scale = _MARGIN * prepared.figures["largest_eigenvalue"] + float(diagonal.max())
        setting.diagnostic("solver_scale", scale)

        def run(product: Product, right: Tensor) -> Solution:
            return accelerated_neumann(product, right, smallest, scale, self.tolerance, self.depth)

        solution, directions = self._solved(queries, setting, diagonal, run)
        worst = float(solution.residuals.max())
        if bool(solution.diverged.any()):
            tell(
                setting,
                f"The Neumann series diverged and was stopped at a residual of {worst:.2g}: the {self.name} has "
                f"eigenvalues outside 0 to {scale:.3g}. Use `matrix='ggn'` or a larger `damping=`.",
            )
        elif worst > self.tolerance:
            tell(
                setting,
                f"The Neumann series did not converge: residual {worst:.2g} after {solution.iterations} terms, asked "
                f"for {self.tolerance:.2g}; eigenvalues reach from {smallest:.2g} to {scale:.3g}. Raise `depth=` or "
                "`damping=`, or use `ConjugateGradient()`.",
            )
        return directions
