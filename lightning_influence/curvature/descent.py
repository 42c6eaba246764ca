"""A stretch of preconditioned gradient descent on a quadratic loss: what it makes of a gradient, and of a change."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Descent:
    r"""Steps :math:`w \leftarrow w - \eta P (\nabla + (C + A) w) - \eta D w`, all of it held fixed, in their limit.

    Behind them a change of weights v is :math:`S v` and a constant gradient g has moved the weights by :math:`-F g`:

    .. math:: S = P^{1/2} e^{-M} P^{-1/2}, \quad F = P^{1/2} (I - e^{-M}) M^{-1} P^{1/2}, \quad
        M = P^{1/2} (C + A) P^{1/2} + D

    with the sum of the learning rates inside P and D.

    Args:
        pace: the diagonal of P by parameter, [*shape] float64, at least 0: how far one moves per unit of gradient.
        added: likewise of A, to the curvature's diagonal.
        shrunk: likewise of D: by how much one shrinks besides, as under decoupled weight decay.
    """

    pace: Mapping[str, Tensor]
    added: Mapping[str, Tensor]
    shrunk: Mapping[str, Tensor]


def share_moved(exponents: Tensor) -> Tensor:
    """(1 - exp(-x)) / x, the part of its first speed that a coordinate keeps on average; 1 at 0."""
    steep = exponents.abs() > 1e-12
    safe = torch.where(steep, exponents, torch.ones_like(exponents))
    return torch.where(steep, -torch.expm1(-safe) / safe, torch.ones_like(exponents))
