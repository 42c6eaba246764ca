"""A dense symmetric matrix factored once, for many solves; refused where it is singular."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_INVERSE_ITERATIONS = 8


class SingularError(ArithmeticError):
    """The smallest eigenvalue is nothing but rounding."""


@dataclass(frozen=True)
class Factored:
    """A Cholesky factorisation, or an LU one where the matrix is not positive definite.

    Args:
        factor: lower Cholesky factor, or the compact LU.
        pivots: of the LU; None for Cholesky.
    """

    factor: Tensor
    pivots: Tensor | None = None

    @property
    def positive(self) -> bool:
        """Whether the matrix is positive definite."""
        return self.pivots is None

    def solve(self, right: Tensor) -> Tensor:
        """A^-1 b for each b of [vector, entries]."""
        if self.pivots is None:
            return torch.cholesky_solve(right.T, self.factor).T
        return torch.linalg.lu_solve(self.factor, self.pivots, right.T).T

    @cached_property
    def inverse(self) -> Tensor:
        """A^-1 written out."""
        return self.solve(torch.eye(len(self.factor)).to(self.factor))


def factored(matrix: Tensor, precision: float) -> Factored:
    """Factors a symmetric matrix.

    Args:
        matrix: [n, n] float64.
        precision: relative rounding error of its entries.

    Raises:
        SingularError: its smallest eigenvalue in magnitude is not above the rounding errors of its largest.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = None
    if int(failed):
        factor, pivots, failed = torch.linalg.lu_factor_ex(matrix)
        if int(failed):
            raise SingularError("an exact zero on the way")
    found = Factored(factor, pivots)
    largest = float(torch.linalg.matrix_norm(matrix, 1)) if matrix.numel() else 1.0
    smallest = _smallest(found, len(matrix))
    if not smallest > precision * largest:
        raise SingularError(f"its smallest eigenvalue is about {smallest:.1g} beside a largest of {largest:.3g}")
    return found


def _smallest(found: Factored, size: int) -> float:
    """The smallest eigenvalue in magnitude, by inverse iteration."""
    if not size:
        return torch.inf
    start = torch.randn(1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = start.to(found.factor) / torch.linalg.vector_norm(start)
    growth = 0.0
    for _ in range(_INVERSE_ITERATIONS):
        image = found.solve(vector)
        growth = float(torch.linalg.vector_norm(image))
        if not growth < torch.inf:
            return 0.0
        vector = image / growth
    return 1 / growth
