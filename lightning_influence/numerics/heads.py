"""Losses on the outputs of linear heads: recognising them, and their derivatives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.devices import wide

Rows = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Iterates over the training set in blocks: features [example, dim] and targets [example, class], float64."""


@dataclass(frozen=True)
class Link:
    r"""A loss with a canonical link: its gradient with respect to the logits z is ``scale`` × (mean(z) - target).

    Args:
        kind: ``"softmax"`` (cross-entropy), ``"sigmoid"`` (binary cross-entropy) or ``"identity"`` (squared error).
        scale: the factor in front of the loss: 1 for the cross-entropy, 2 / class for a mean of squares.
    """

    kind: str
    scale: float = 1.0

    def mean(self, z: Tensor) -> Tensor:
        """The model's expectation of the target, [example, class]: the link's inverse."""
        if self.kind == "softmax":
            return z.softmax(1)
        return z.sigmoid() if self.kind == "sigmoid" else z

    def target(self, z: Tensor, gradient: Tensor) -> Tensor:
        """The target, recovered from the gradient of the loss with respect to the logits."""
        return self.mean(z) - gradient / self.scale

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """[example]: the loss, up to a constant that does not depend on z."""
        if self.kind == "softmax":
            value = z.logsumexp(1) - (target * z).sum(1)
        elif self.kind == "sigmoid":
            value = (F.softplus(z) - target * z).sum(1)
        else:
            value = (z - target).square().sum(1) / 2
        return self.scale * value

    def curvature(self, mean: Tensor, direction: Tensor) -> Tensor:
        """The Hessian of the loss with respect to z times a vector, [example, class], given ``mean`` of z."""
        if self.kind == "softmax":
            weighted = mean * direction
            return self.scale * (weighted - mean * weighted.sum(1, keepdim=True))
        if self.kind == "sigmoid":
            return self.scale * mean * (1 - mean) * direction
        return self.scale * direction

    def variances(self, mean: Tensor, directions: Tensor | None) -> Tensor:
        """The curvature by the logits, over ``scale``, along each column of ``directions`` (None: each class).

        Args:
            mean: of the logits, [example, class].
            directions: [class, direction].
        """
        if self.kind == "identity":
            return torch.ones_like(mean)
        if directions is None:
            return mean * (1 - mean)
        return (mean @ directions.square() - (mean @ directions).square()).clamp_min_(0)


def recognise(z: Tensor, gradient: Tensor, moved: Tensor, moved_gradient: Tensor, tolerance: float) -> Link | None:
    """Find the loss that explains how its gradient changed between two values of the logits, or None.

    Args:
        z: logits, [example, class].
        gradient: of the loss with respect to ``z``.
        moved: other logits.
        moved_gradient: of the loss with respect to ``moved``.
        tolerance: the largest error, relative to the change of the gradient.
    """
    change = wide(moved_gradient - gradient)
    for kind in ("softmax", "sigmoid", "identity"):
        if kind == "softmax" and z.shape[1] == 1:
            continue
        link = Link(kind)
        expected = link.mean(wide(moved)) - link.mean(wide(z))
        scale = float((expected * change).sum() / expected.square().sum())
        if scale > 0 and float((change - scale * expected).norm()) <= tolerance * float(change.norm()):
            return Link(kind, scale)
    return None
