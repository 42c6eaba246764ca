"""Linear solvers and eigenvalues by products with a symmetric matrix, several right-hand sides at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""[vector, entries] -> [vector, entries], every vector times the matrix."""


@dataclass(frozen=True)
class Solution:
    """What an iterative solver found.

    Args:
        vectors: [vector, entries].
        residuals: [vector], length of b - A x relative to that of b.
        iterations: of the slowest right-hand side.
        bent: [vector], whether a direction along which the matrix is not positive was met there.
        diverged: [vector], whether the residual grew without bound; the best iterate is returned.
    """

    vectors: Tensor
    residuals: Tensor
    iterations: int
    bent: Tensor
    diverged: Tensor


def conjugate_gradient(product: Product, right: Tensor, tolerance: float, most: int) -> Solution:
    """Conjugate gradients (Hestenes and Stiefel, 1952), each right-hand side on its own steps.

    Args:
        product: with a positive definite matrix.
        right: [vector, entries].
        tolerance: of the relative residual.
        most: iterations.
    """
    x, r = torch.zeros_like(right), right.clone()
    p, rr = r.clone(), r.square().sum(1)
    size = rr.sqrt()
    bent = torch.zeros_like(rr, dtype=torch.bool)
    active, iterations = rr.sqrt() > tolerance * size, 0
    while bool(active.any()) and iterations < most:
        rows = active.nonzero()[:, 0]
        ap = product(p[rows])
        curve = (p[rows] * ap).sum(1)
        bent[rows] |= curve <= 0
        keep = curve > 0
        rows, ap, curve = rows[keep], ap[keep], curve[keep]
        step = (rr[rows] / curve)[:, None]
        x[rows] += step * p[rows]
        r[rows] -= step * ap
        new = r[rows].square().sum(1)
        p[rows] = r[rows] + (new / rr[rows])[:, None] * p[rows]
        rr[rows] = new
        iterations += 1
        active = (rr.sqrt() > tolerance * size) & ~bent
    left = torch.linalg.vector_norm(right - product(x), dim=1)  # the running one forgets rounding errors
    return Solution(x, _relative(left, size), iterations, bent, torch.zeros_like(bent))


def neumann(product: Product, right: Tensor, scale: float, depth: int) -> Tensor:
    """The first ``depth`` terms of the Neumann series, (1/scale) sum over k of (I - A/scale)^k b.

    Converges to A^-1 b where every eigenvalue of A lies between 0 and 2 scale.
    """
    x = torch.zeros_like(right)
    for _ in range(depth):
        x = x + (right - product(x)) / scale
    return x


def accelerated_neumann(
    product: Product, right: Tensor, smallest: float, scale: float, tolerance: float, most: int
) -> Solution:
    """The Neumann series with Chebyshev's weights (Golub and Varga, 1961): the square root of its iterations.

    Args:
        product: with a positive definite matrix.
        right: [vector, entries].
        smallest: a lower bound of the matrix's eigenvalues, positive.
        scale: an upper bound.
        tolerance: of the relative residual; each right-hand side stops there.
        most: iterations.
    """
    centre, reach = (scale + smallest) / 2, max((scale - smallest) / 2, 1e-12 * scale)
    x, r = torch.zeros_like(right), right.clone()
    size = torch.linalg.vector_norm(right, dim=1)
    ratio = reach / centre
    weight, step = ratio, r / centre
    best, least, iterations = x.clone(), size.clone(), 0
    diverged = torch.zeros_like(size, dtype=torch.bool)
    active = size > 0
    while bool(active.any()) and iterations < most:
        rows = active.nonzero()[:, 0]
        x[rows] += step[rows]
        r[rows] = right[rows] - product(x[rows])
        following = 1 / (2 / ratio - weight)
        step[rows] = following * weight * step[rows] + (2 * following / reach) * r[rows]
        weight = following
        iterations += 1
        now = torch.linalg.vector_norm(r, dim=1)
        wild = ~now.isfinite() | (now > 1e3 * size)
        better = active & (now < least) & ~wild
        best[better], least = x[better], torch.where(better, now, least)
        diverged |= active & wild
        active = (least > tolerance * size) & ~diverged
    return Solution(best, _relative(least, size), iterations, torch.zeros_like(diverged), diverged)


def largest_eigenvalue(product: Product, like: Tensor, seed: int, tolerance: float = 0.02, most: int = 300) -> float:
    """An upper bound of the eigenvalue of largest magnitude, by power iteration from a seeded start.

    The Rayleigh quotient plus the length of its residual: within that distance there is an eigenvalue.

    Args:
        product: with a symmetric matrix.
        like: [entries], its dtype and device.
        seed: of the start.
        tolerance: length of the residual relative to the quotient at which to stop.
        most: iterations.
    """
    vector, bound = _normal(like, 1, seed), 0.0
    vector /= torch.linalg.vector_norm(vector)
    for _ in range(most):
        image = product(vector)
        length = float(torch.linalg.vector_norm(image))
        if length == 0 or not math.isfinite(length):
            return length
        quotient = float((vector * image).sum())
        residual = float(torch.linalg.vector_norm(image - quotient * vector))
        bound = abs(quotient) + residual
        if residual <= tolerance * abs(quotient):
            break
        vector = image / length
    return bound


def mean_diagonal(product: Product, like: Tensor, seed: int, probes: int = 32) -> float:
    """Trace over size, by Hutchinson's estimate with seeded signs."""
    signs = _normal(like, probes, seed).sign()
    return float((signs * product(signs)).sum() / (probes * like.numel()))


def lanczos(product: Product, like: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ritz values and vectors of a symmetric matrix from a Krylov space, in float64, reorthogonalised twice each step.

    Args:
        product: with the matrix; is given vectors in the dtype of ``like``.
        like: [entries].
        steps: dimension of the space; fewer where it is invariant before.
        seed: of the normal start.

    Returns:
        Values [k] ascending, and vectors [k, entries], orthonormal.
    """
    steps = min(steps, like.numel())
    basis = torch.zeros(steps, like.numel(), dtype=torch.float64, device=like.device)
    start = _normal(like, 1, seed)[0].double()
    basis[0] = start / torch.linalg.vector_norm(start)
    small = torch.zeros(steps, steps, dtype=torch.float64, device=like.device)
    size = 0
    for j in range(steps):
        image = product(basis[j].to(like)[None])[0].double()
        for _ in range(2):  # once leaves errors of the order of the machine's precision times the condition
            shares = basis[: j + 1] @ image
            small[: j + 1, j] += shares
            image -= shares @ basis[: j + 1]
        size = j + 1
        length = float(torch.linalg.vector_norm(image))
        largest = float(small.abs().max())
        if size == steps or length <= torch.finfo(like.dtype).eps * 10 * max(largest, 1e-300):
            break
        basis[size], small[size, j] = image / length, length
    symmetric = (small[:size, :size] + small[:size, :size].T) / 2
    values, vectors = torch.linalg.eigh(symmetric)
    return values, vectors.T @ basis[:size]


def _normal(like: Tensor, count: int, seed: int) -> Tensor:
    """[count, entries], the same on every device."""
    draw = torch.randn(count, like.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw.to(like)


def _relative(length: Tensor, size: Tensor) -> Tensor:
    return torch.where(size > 0, length / size.clamp_min(torch.finfo(size.dtype).tiny), torch.zeros_like(size))
