"""Gradient clipping by norm and by value, and its derivative."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Named = Mapping[str, Tensor]
"""Tensors by parameter name."""


@dataclass(frozen=True)
class Clipping(ABC):
    """Clips the gradients of all parameters of one optimizer together.

    Args:
        limit: the largest norm or absolute value that passes.
    """

    limit: float

    @abstractmethod
    def __call__(self, gradients: Named) -> dict[str, Tensor]:
        """The clipped gradients."""

    @abstractmethod
    def derivative(self, gradients: Named, changes: Named) -> dict[str, Tensor]:
        """The derivative of clipping at ``gradients`` times each of k vectors.

        The Jacobian is symmetric, so that this serves Jacobian-vector and vector-Jacobian products alike.

        Args:
            gradients: before clipping, [*shape] by name.
            changes: the vectors, [k, *shape] by name.
        """


class ByNorm(Clipping):
    """``torch.nn.utils.clip_grad_norm_``: all gradients times min(1, limit / (norm + 1e-6))."""

    def __call__(self, gradients: Named) -> dict[str, Tensor]:
        """The clipped gradients."""
        factor = self.factor(gradients)
        return {name: gradient * factor for name, gradient in gradients.items()}

    def factor(self, gradients: Named) -> Tensor:
        """The number that all gradients are multiplied by, min(1, limit / (norm + 1e-6))."""
        return (self.limit / (_norm(gradients) + 1e-6)).clamp(max=1.0)

    def derivative(self, gradients: Named, changes: Named) -> dict[str, Tensor]:
        """The product rule: the factor times each vector, plus the vector's effect on the factor."""
        factor, pull = self.terms(gradients)
        less = pull * sum(changes[name].flatten(1) @ gradients[name].flatten() for name in changes)
        return {
            name: factor * change - less.reshape(-1, *[1] * gradients[name].ndim) * gradients[name]
            for name, change in changes.items()
        }

    def terms(self, gradients: Named) -> tuple[Tensor, Tensor]:
        """Numbers c and r of the derivative c I - r g g^T at the gradient g."""
        norm = _norm(gradients)
        factor = self.limit / (norm + 1e-6)
        active = (factor < 1.0).to(factor)
        length = torch.where(norm > 0, norm, torch.ones_like(norm))  # at zero nothing is clipped
        return factor.clamp(max=1.0), active * self.limit / ((norm + 1e-6).square() * length)


class ByValue(Clipping):
    """``torch.nn.utils.clip_grad_value_``: every entry between -limit and limit."""

    def __call__(self, gradients: Named) -> dict[str, Tensor]:
        """The clipped gradients."""
        return {name: gradient.clamp(-self.limit, self.limit) for name, gradient in gradients.items()}

    def derivative(self, gradients: Named, changes: Named) -> dict[str, Tensor]:
        """Each vector, with zeros for the entries that are clipped."""
        return {name: change * (gradients[name].abs() <= self.limit) for name, change in changes.items()}


def _norm(gradients: Named) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
