"""Linear solvers and eigenvalue estimates that need only products with a symmetric matrix, for many vectors at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.devices import wide, wide_device
from lightning_influence.numerics.dense import eigenpairs

Product = Callable[[Tensor], Tensor]
"""[vector, entries] -> [vector, entries]: the matrix times each vector."""

Watch = Callable[[Tensor], bool]
"""Called after each iteration with the residuals relative to the norm of b, [vector]; True: stop."""

PROBES = 32
"""Random vectors that the mean eigenvalue is estimated with."""


@dataclass(frozen=True)
class Solution:
    """The result of an iterative solver.

    Args:
        vectors: the solutions x, [vector, entries].
        residuals: [vector]: norm of b - A x relative to the norm of b.
        iterations: those of the slowest right-hand side.
        indefinite: [vector]: whether a search direction had a curvature of at most 0: A is not positive definite.
        diverged: [vector]: whether the residual grew without bound; the best iterate is returned then.
        stopped: whether it was stopped by ``watch``.
    """

    vectors: Tensor
    residuals: Tensor
    iterations: int
    indefinite: Tensor
    diverged: Tensor
    stopped: bool = False


def _never(residuals: Tensor) -> bool:
    return False


def conjugate_gradient(
    product: Product, right: Tensor, tolerance: float, max_iterations: int, watch: Watch = _never
) -> Solution:
    """Conjugate gradients (Hestenes and Stiefel, 1952), with separate steps for each right-hand side.

    Args:
        product: with a positive definite matrix.
        right: the right-hand sides b, [vector, entries].
        tolerance: the relative residual at which a right-hand side is solved.
        max_iterations: the most iterations to make.
        watch: see ``Watch``.
    """
    x, r = torch.zeros_like(right), right.clone()
    p, rr = r.clone(), r.square().sum(1)
    size = rr.sqrt()
    indefinite = torch.zeros_like(rr, dtype=torch.bool)
    rows, iterations = _places(rr.sqrt() > tolerance * size), 0
    while len(rows) and iterations < max_iterations:
        ap = product(p[rows])
        curve = (p[rows] * ap).sum(1)
        indefinite[rows] |= curve <= 0
        keep = _places(curve > 0)
        rows, ap, curve = rows[keep], ap[keep], curve[keep]
        step = (rr[rows] / curve)[:, None]
        x[rows] += step * p[rows]
        r[rows] -= step * ap
        new = r[rows].square().sum(1)
        p[rows] = r[rows] + (new / rr[rows])[:, None] * p[rows]
        rr[rows] = new
        iterations += 1
        rows = _places((rr.sqrt() > tolerance * size) & ~indefinite)
        if watch(_relative(rr.sqrt(), size)):
            break
    left = torch.linalg.vector_norm(right - product(x), dim=1)  # the recursive residual misses rounding errors
    return Solution(x, _relative(left, size), iterations, indefinite, torch.zeros_like(indefinite))


def accelerated_neumann(
    product: Product,
    right: Tensor,
    smallest: float,
    scale: float,
    tolerance: float,
    max_iterations: int,
    watch: Watch = _never,
) -> Solution:
    """The Neumann series accelerated by Chebyshev's semi-iteration (Golub and Varga, 1961).

    It needs about the square root of the plain series' iterations.

    Args:
        product: with a positive definite matrix.
        right: the right-hand sides b, [vector, entries].
        smallest: a positive lower bound of the matrix's eigenvalues.
        scale: an upper bound of them.
        tolerance: the relative residual at which a right-hand side is solved.
        max_iterations: the most iterations to make.
        watch: see ``Watch``.
    """
    centre, reach = (scale + smallest) / 2, max((scale - smallest) / 2, 1e-12 * scale)
    x, r = torch.zeros_like(right), right.clone()
    size = torch.linalg.vector_norm(right, dim=1)
    ratio = reach / centre
    weight, step = ratio, r / centre
    best, least, iterations = x.clone(), size.clone(), 0
    diverged = torch.zeros_like(size, dtype=torch.bool)
    active = size > 0
    rows = _places(active)
    while len(rows) and iterations < max_iterations:
        x[rows] += step[rows]
        r[rows] = right[rows] - product(x[rows])
        following = 1 / (2 / ratio - weight)
        step[rows] = following * weight * step[rows] + (2 * following / reach) * r[rows]
        weight = following
        iterations += 1
        now = torch.linalg.vector_norm(r, dim=1)
        wild = ~now.isfinite() | (now > 1e3 * size)
        better = active & (now < least) & ~wild
        best, least = torch.where(better[:, None], x, best), torch.where(better, now, least)
        diverged |= active & wild
        active = (least > tolerance * size) & ~diverged
        rows = _places(active)
        if watch(_relative(least, size)):
            break
    return Solution(best, _relative(least, size), iterations, torch.zeros_like(diverged), diverged)


def largest_eigenvalue(
    product: Product, like: Tensor, seed: int, tolerance: float = 0.02, max_iterations: int = 300
) -> float:
    """Estimate the largest magnitude of an eigenvalue from above, by power iteration from a seeded start.

    Returned is the magnitude of the Rayleigh quotient plus the norm of its residual: an eigenvalue lies within that
    distance of the quotient.

    Args:
        product: with a symmetric matrix.
        like: [entries], for its size, dtype and device.
        seed: of the first iterate.
        tolerance: stop when the norm of the residual is at most this times the quotient.
        max_iterations: the most iterations to make.
    """
    vector, bound = _normal(like, 1, seed), 0.0
    vector /= torch.linalg.vector_norm(vector)
    for _ in range(max_iterations):
        image = product(vector)
        size, share = torch.linalg.vector_norm(image), (vector * image).sum()
        rest = torch.linalg.vector_norm(image - share * vector)
        length, quotient, residual = torch.stack([size, share, rest]).tolist()  # with a single wait for a device
        if length == 0 or not math.isfinite(length):
            return float(length)
        bound = abs(quotient) + residual
        if residual <= tolerance * abs(quotient):
            break
        vector = image / length
    return bound


def eigenvalue_bounds(product: Product, like: Tensor, seed: int, steps: int = 60) -> tuple[float, float]:
    """An estimate of the smallest eigenvalue and an upper bound of all, by the Lanczos method without a stored basis.

    They are the extreme Ritz values, moved outwards by the norms of their residuals (Zhou and Li, 2011), the largest
    also by a twentieth of their distance. Unlike power iteration, the method does not stop inside of the spectrum.

    Args:
        product: with a symmetric matrix.
        like: [entries], for its size, dtype and device.
        seed: of the first vector.
        steps: the most products to make.
    """
    vector = _normal(like, 1, seed)
    vector /= torch.linalg.vector_norm(vector)
    before, length = torch.zeros_like(vector), 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, like.numel())):
        image = product(vector) - length * before
        diagonal.append(float((vector * image).sum()))
        image -= diagonal[-1] * vector
        length = float(torch.linalg.vector_norm(image))
        largest = max(abs(x) for x in (*diagonal, *beside))
        if not math.isfinite(length) or length <= 10 * torch.finfo(like.dtype).eps * largest:
            break
        beside.append(length)
        before, vector = vector, image / length
    edges = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    matrix = torch.tensor(diagonal, dtype=torch.float64).diag() + edges.diag(1) + edges.diag(-1)
    if not bool(matrix.isfinite().all()):
        return -math.inf, math.inf
    values, vectors = eigenpairs(matrix)
    least, most = (float(values[k] + sign * length * vectors[-1, k].abs()) for k, sign in ((0, -1), (-1, 1)))
    return least, most + 0.05 * (most - least)


def mean_diagonal(product: Product, like: Tensor, seed: int, probes: int = PROBES) -> float:
    """The trace over the size of a matrix, by Hutchinson's estimate with seeded random signs."""
    signs = _normal(like, probes, seed).sign()
    return float((signs * product(signs)).sum() / (probes * like.numel()))


def lanczos(product: Product, like: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ritz values and vectors of a symmetric matrix in a Krylov space, in float64 with full reorthogonalisation.

    Args:
        product: with the matrix; it is called with vectors in the dtype of ``like``.
        like: [entries], for its size, dtype and device.
        steps: dimension of the Krylov space; a space that becomes invariant earlier has fewer.
        seed: of the first vector, which has normal entries.

    Returns:
        Values [k] in ascending order, and orthonormal vectors [k, entries].
    """
    steps = min(steps, like.numel())
    basis = torch.zeros(steps, like.numel(), dtype=torch.float64, device=wide_device(like.device))
    start = wide(_normal(like, 1, seed)[0])
    basis[0] = start / torch.linalg.vector_norm(start)
    small = torch.zeros(steps, steps, dtype=torch.float64, device=wide_device(like.device))
    size = 0
    for j in range(steps):
        image = wide(product(basis[j].to(like)[None])[0])
        for _ in range(2):  # a single pass leaves errors of machine precision times the condition number
            shares = basis[: j + 1] @ image
            small[: j + 1, j] += shares
            image -= shares @ basis[: j + 1]
        size = j + 1
        length, largest = torch.stack([torch.linalg.vector_norm(image), small.abs().max()]).tolist()
        if size == steps or length <= torch.finfo(like.dtype).eps * 10 * max(largest, 1e-300):
            break
        basis[size], small[size, j] = image / length, length
    symmetric = (small[:size, :size] + small[:size, :size].T) / 2
    values, vectors = eigenpairs(symmetric)
    return values, vectors.T @ basis[:size]


def _normal(like: Tensor, count: int, seed: int) -> Tensor:
    """Normal entries, [count, entries], the same on every device."""
    draw = torch.randn(count, like.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw.to(like)


def _places(where: Tensor) -> Tensor:
    """Where a vector of conditions holds. A device is waited for, once."""
    return where.nonzero()[:, 0]


def _relative(length: Tensor, size: Tensor) -> Tensor:
    return torch.where(size > 0, length / size.clamp_min(torch.finfo(size.dtype).tiny), torch.zeros_like(size))
