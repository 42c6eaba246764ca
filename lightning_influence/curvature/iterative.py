"""What iterative solvers share: products with the damped curvature, and the diagnostics of a solution."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.checks import one_of
from lightning_influence.curvature.cost import seconds_of_products
from lightning_influence.curvature.curvature import Curvature, PreparedCurvature
from lightning_influence.curvature.damping import of_group
from lightning_influence.gradients.products import Matrix, Products
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.numerics.solvers import Product, Solution, conjugate_gradient, mean_diagonal
from lightning_influence.setting.setting import Setting

_PROBES = 32  # for the mean eigenvalue
# An MLP on the digits takes about this many with the default damping.
_ITERATIONS = 50


@dataclass(frozen=True)
class Iterative(Curvature):
    """The base class of inverses that need only products with the curvature, in the memory of a few vectors per query.

    Args:
        damping: added to the diagonal, in units of the curvature; None chooses it from the fit (see ``Curvature``).
        matrix: the Gauss-Newton matrix (``"ggn"``) or the Hessian (``"hessian"``).
        seed: of the random probes that estimate eigenvalues.
    """

    matrix: Matrix = "ggn"
    seed: int = 0

    copies: ClassVar[int | None] = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("matrix", self.matrix, ("ggn", "hessian"))

    @property
    def name(self) -> str:
        """The matrix's name in messages."""
        return "GGN" if self.matrix == "ggn" else "Hessian"

    def prepare(self, setting: Setting) -> PreparedCurvature:
        """The mean eigenvalue, by Hutchinson's estimate with 32 seeded random vectors."""
        return PreparedCurvature(diagnostics={"mean_eigenvalue": mean_diagonal(*self._undamped(setting), self.seed)})

    def seconds(self, setting: Setting, vectors: int) -> float:
        """The time of the products with the curvature."""
        return seconds_of_products(setting, self.matrix, _PROBES + self.multiplied(vectors))

    def multiplied(self, vectors: int) -> int:
        """How many products it takes to solve for this many vectors, at a guessed number of iterations."""
        return _ITERATIONS * vectors

    def _undamped(self, setting: Setting) -> tuple[Product, Tensor]:
        """The product with the curvature alone, and a vector of zeros of its size, dtype and device."""
        products = Products(setting.engine, setting.examples)
        like = products.like.detach().new_zeros(len(products.flat))
        return lambda vectors: products.times(self.matrix, vectors), like

    def _solved(
        self, queries: QueryGradients, setting: Setting, diagonal: Tensor, run: Callable[[Product, Tensor], Solution]
    ) -> tuple[Solution, QueryGradients]:
        """Solve for a block of queries and record the residual and the iterations."""
        products = Products(setting.engine, setting.examples)
        right = products.flat.join(queries.dense(), len(queries), products.like)
        good = right.isfinite().all(1)  # the attributor reports the others
        added = products.flat.fill(of_group(diagonal, setting.engine.groups)).to(products.like)

        def damped(vectors: Tensor) -> Tensor:
            return products.times(self.matrix, vectors) + added * vectors

        solution = run(damped, torch.where(good[:, None], right, 0))
        setting.diagnostic("solver_residual", float(solution.residuals.max()))
        setting.diagnostic("solver_iterations", solution.iterations)
        found = torch.where(good[:, None], solution.vectors, torch.nan)
        return solution, DenseQueries(products.flat.split(found), setting.engine.groups)

    def roughly_solved(
        self, queries: QueryGradients, setting: Setting, diagonal: Tensor, tolerance: float, iterations: int
    ) -> QueryGradients:
        """Solve by conjugate gradients with the GGN, and report nothing."""
        products = Products(setting.engine, setting.examples)
        right = products.flat.join(queries.dense(), len(queries), products.like)
        added = products.flat.fill(of_group(diagonal, setting.engine.groups)).to(products.like)

        def damped(vectors: Tensor) -> Tensor:
            return products.times("ggn", vectors) + added * vectors

        finite = torch.where(right.isfinite().all(1)[:, None], right, 0)
        solution = conjugate_gradient(damped, finite, tolerance, iterations)
        return DenseQueries(products.flat.split(solution.vectors), setting.engine.groups)


def smallest_entry(diagonal: Tensor, kind: str, name: str) -> float:
    """The smallest entry of a diagonal.

    Raises:
        ValueError: it is not positive, with which a solver might not converge.
    """
    least = float(diagonal.min())
    if not least > 0:
        raise ValueError(
            f"Expected a positive diagonal for `{name}`, got weight decay + damping = {least:.3g}: the {kind} alone is "
            "probably singular. Pass a positive `damping=`, or None to choose it by the fit's learning rates."
        )
    return least
