"""A stretch of preconditioned gradient descent on a quadratic loss, and the matrices that describe it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_influence.devices import read_ends


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

    @cached_property
    def _ends(self) -> dict[tuple[int, str], list[float]]:
        """The smallest and the largest entry of P, A and D (0, 1, 2) by parameter, with a single wait."""
        diagonals = enumerate((self.preconditioner, self.added, self.decoupled_decay))
        entries = {(i, name): entry for i, of_all in diagonals for name, entry in of_all.items() if entry.numel()}
        return dict(zip(entries, read_ends([*entries.values()]), strict=True))

    @property
    def preconditions(self) -> bool:
        """Whether P has different entries for one parameter."""
        return any(least < most for (i, _), (least, most) in self._ends.items() if i == 0)

    def is_uniform(self, names: Collection[str]) -> bool:
        """Whether P, A and D are numbers for some parameters together."""
        of_each = [
            {end for (k, name), ends in self._ends.items() if k == i and name in names for end in ends}
            for i in range(3)
        ]
        return all(len(numbers) <= 1 for numbers in of_each)


def mean_exponential(exponents: Tensor) -> Tensor:
    """(1 - exp(-x)) / x, the mean of exp(-x t) over t from 0 to 1; 1 at x = 0."""
    steep = exponents.abs() > 1e-12
    safe = torch.where(steep, exponents, torch.ones_like(exponents))
    return torch.where(steep, -torch.expm1(-safe) / safe, torch.ones_like(exponents))
