"""A stretch of preconditioned gradient descent on a quadratic loss, and the matrices that describe it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Descent:
    r"""Steps :math:`w \leftarrow w - \eta P (\nabla + (C + A) w) - \eta D w` with fixed matrices, in continuous time.

    They turn a change v of the first weights into a change :math:`S v` of the last, and a constant gradient g moves
    the last weights by :math:`-F g`:

    .. math:: S = P^{1/2} e^{-M} P^{-1/2}, \quad F = P^{1/2} (I - e^{-M}) M^{-1} P^{1/2}, \quad
        M = P^{1/2} (C + A) P^{1/2} + D

    where P and D include the sum of the learning rates.

    Args:
        preconditioner: the diagonal of P by parameter name, [*shape] float64, at least 0.
        added: the diagonal of A likewise: weight decay and damping, which are added to the curvature.
        decoupled_decay: the diagonal of D likewise: how much weights shrink without a gradient, as under AdamW.
    """

    preconditioner: Mapping[str, Tensor]
    added: Mapping[str, Tensor]
    decoupled_decay: Mapping[str, Tensor]


def mean_exponential(exponents: Tensor) -> Tensor:
    """(1 - exp(-x)) / x, the mean of exp(-x t) over t from 0 to 1; 1 at x = 0."""
    steep = exponents.abs() > 1e-12
    safe = torch.where(steep, exponents, torch.ones_like(exponents))
    return torch.where(steep, -torch.expm1(-safe) / safe, torch.ones_like(exponents))
