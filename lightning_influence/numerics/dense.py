"""Factorisations and eigenvectors of dense symmetric matrices."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_influence.devices import has_float64, on_host, read_numbers, wide

_INVERSE_ITERATIONS = 8
SMALL = 512
"""Up to this width, eigenvectors take no longer on the CPU than on a device."""


class SingularError(ArithmeticError):
    """The smallest eigenvalue is no larger than rounding errors."""


@dataclass(frozen=True)
class Factorisation:
    """A Cholesky factorisation, or an LU factorisation of a matrix that is not positive definite.

    Args:
        factor: the lower Cholesky factor, or the compact LU factors.
        pivots: those of the LU factorisation; None for Cholesky.
    """

    factor: Tensor
    pivots: Tensor | None = None

    @property
    def positive(self) -> bool:
        """Whether the matrix is positive definite."""
        return self.pivots is None

    def solve(self, right: Tensor) -> Tensor:
        """A^-1 b for each row b of ``right``, [vector, entries]."""
        if self.pivots is None:
            return torch.cholesky_solve(right.T, self.factor).T
        return torch.linalg.lu_solve(self.factor, self.pivots, right.T).T

    @cached_property
    def inverse(self) -> Tensor:
        """A^-1 as a dense matrix."""
        return self.solve(torch.eye(len(self.factor)).to(self.factor))


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors as columns, as of ``torch.linalg.eigh``, which may fail.

    In float32 it raises, or returns NaN, for some matrices of low rank (of 200 digits of MNIST, say), depending on
    their scale: then they are computed in float64. NaN or infinity in the matrix gives NaN.
    """
    ((values, vectors),) = all_eigenpairs([matrix])
    return values.to(matrix), vectors.to(matrix)


def all_eigenpairs(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The same for several matrices, on the CPU where it is the faster: small ones come there with a single wait."""
    moved = [i for i, matrix in enumerate(matrices) if len(matrix) <= SMALL or not has_float64(matrix.device)]
    here = dict(zip(moved, on_host([matrices[i] for i in moved]), strict=True))
    return [_eigenpairs(here.get(i, matrix)) for i, matrix in enumerate(matrices)]


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        found = _tried(matrix)
    except RuntimeError:  # a device lacks memory, or its solver fails for large matrices
        if matrix.is_cpu:
            raise
        found = None
    if found is not None:
        return found
    if matrix.is_cpu:
        raise ArithmeticError(f"Expected eigenvalues of a symmetric matrix of width {len(matrix)}, got no convergence.")
    values, vectors = _eigenpairs(matrix.cpu())
    return values.to(matrix), vectors.to(matrix)


def _tried(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """The eigenpairs where the matrix is, by a few ways; None if none of them converges."""
    if not bool(matrix.isfinite().all()):
        return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)
    for scale in (0.0, 1.0, 3.0):
        with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            values, vectors = torch.linalg.eigh(wide(matrix) / scale if scale else matrix)
            if bool(values.isfinite().all() & vectors.isfinite().all()):
                return (values * scale).to(matrix) if scale else values, vectors.to(matrix)
    return None


def factorise(matrix: Tensor, precision: float) -> Factorisation:
    """Factorise a symmetric matrix.

    Args:
        matrix: [n, n] float64.
        precision: the relative rounding error of its entries.

    Raises:
        SingularError: its smallest eigenvalue in magnitude does not exceed ``precision`` times its largest.
    """
    for positive in (True, False):
        if positive:
            factor, failed = torch.linalg.cholesky_ex(matrix)
            factorisation = Factorisation(factor)
        else:
            factor, pivots, failed = torch.linalg.lu_factor_ex(matrix)
            factorisation = Factorisation(factor, pivots)
        largest = torch.linalg.matrix_norm(matrix, 1) if matrix.numel() else matrix.new_ones(())
        (wrong,), (most,), (growth, finite) = read_numbers([failed, largest, _growth(factorisation, len(matrix))])
        if not wrong:
            break
    if wrong:
        raise SingularError("a pivot of its LU factorisation is exactly zero")
    smallest = 1 / growth if growth and finite else 0.0 if len(matrix) else torch.inf
    if not smallest > precision * most:
        raise SingularError(f"its smallest eigenvalue is about {smallest:.1g}, its largest {most:.3g}")
    return factorisation


def _growth(factorisation: Factorisation, size: int) -> Tensor:
    """[2]: 1 over the smallest eigenvalue in magnitude, by inverse iteration, and whether all iterates were finite."""
    start = torch.randn(1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = start.to(factorisation.factor) / torch.linalg.vector_norm(start)
    growth = finite = vector.new_ones(())
    for _ in range(_INVERSE_ITERATIONS):
        image = factorisation.solve(vector)
        growth = torch.linalg.vector_norm(image)
        finite = finite * growth.isfinite()
        vector = image / growth
    return torch.stack([growth, finite])
