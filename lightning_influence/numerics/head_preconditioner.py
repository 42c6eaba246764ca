"""Approximate inverses of the Hessian of a linear head: exact in the strongest directions, diagonal in the others."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.numerics.dense import eigenpairs
from lightning_influence.numerics.heads import Link, Rows

# Up to this many features or classes, their eigenvectors are computed.
_ROTATED = 4096
# The Hessian is approximated on as many training examples, evenly spread, as have this many features together.
_NUMBERS = 2**25
# Making the exact block costs about as many operations as this many products, ...
_PRODUCTS = 16
# ... and it has at most this many numbers.
_BLOCK = 2**22


@dataclass(frozen=True)
class Inverse:
    """Multiplication of [class, dim] by the approximate inverse at one weight.

    Args:
        directions: orthonormal directions of the features as columns, the strongest first; None: the features.
        classes: orthonormal combinations of the classes as columns; None: the classes.
        diagonal: the approximate Hessian in both, [class, dim].
        factor: the Cholesky factor of the exact Hessian in the first directions, of all classes together, or for
            independent classes one for each, [class, direction, direction]; None: the diagonal serves for all.
        exact: how many directions these are.
        outside: the Hessian across all of the directions, if they are fewer than features: the weight decay.
    """

    directions: Tensor | None
    classes: Tensor | None
    diagonal: Tensor
    factor: Tensor | None
    exact: int
    outside: float

    def __call__(self, right: Tensor) -> Tensor:
        """The approximate inverse times ``right``, [class, dim]."""
        if self.directions is None:
            return self._solved(right)
        part = right @ self.directions
        inside = self._solved(part)
        if len(self.directions) == len(self.directions.T):
            return inside @ self.directions.T
        return (inside - part / self.outside) @ self.directions.T + right / self.outside

    def _solved(self, right: Tensor) -> Tensor:
        """The inverse in the directions of the features."""
        if self.classes is None:
            solved = right / self.diagonal
        else:
            solved = self.classes @ (self.classes.T @ right / self.diagonal)
        if self.factor is not None:
            first = right[:, : self.exact].reshape(*self.factor.shape[:-1], 1)
            solved[:, : self.exact] = torch.cholesky_solve(first, self.factor).view(len(right), self.exact)
        return solved


class Preconditioner:
    """Makes approximate inverses of a head's Hessian, the mean of curvature ⊗ f f^T plus the weight decay.

    The features f are rotated to the eigenvectors of their second moment, and the classes to those of the mean
    curvature. There the Hessian's diagonal is exact, as in EK-FAC, and so is its block of the strongest directions of
    the features: unless the weight decay is tiny, little of the remaining curvature is above it.

    Args:
        rows: the training set.
        link: the loss.
        weight_decay: λ.
    """

    def __init__(self, rows: Rows, link: Link, weight_decay: float) -> None:
        self.link, self.weight_decay = link, weight_decay
        features, count = _sample(rows)
        self.operations = 2 * _PRODUCTS * features.shape[1] * count / len(features)
        self.features: Tensor = features
        self.directions: Tensor | None = None
        if min(features.shape) <= _ROTATED:
            self.features, self.directions = _rotated(features)

    def at(self, weight: Tensor) -> Inverse:
        """The approximate inverse at a weight, [class, dim]."""
        weight = weight if self.directions is None else weight @ self.directions
        classes = self._classes(weight)
        diagonal = torch.zeros_like(weight)
        for features, mean in self._blocks(weight):
            diagonal.addmm_(self.link.variances(mean, classes).T, features.square())
        diagonal.mul_(self.link.scale / len(self.features)).add_(self.weight_decay)
        exact = self._directions(diagonal)
        return Inverse(self.directions, classes, diagonal, self._factor(weight, exact), exact, self.weight_decay)

    def _classes(self, weight: Tensor) -> Tensor | None:
        """Eigenvectors of the mean curvature by the logits, as columns; None where the classes do not interact."""
        if self.link.kind != "softmax" or len(weight) > _ROTATED:
            return None
        total = weight.new_zeros(len(weight), len(weight))
        for _, mean in self._blocks(weight):
            total.addmm_(mean.T, mean, alpha=-1).diagonal().add_(mean.sum(0))
        return eigenpairs(total)[1]

    def _directions(self, diagonal: Tensor) -> int:
        """In how many of the directions the Hessian is worth computing exactly."""
        classes, dim = diagonal.shape
        if self.link.kind == "identity" or self.directions is None:
            return 0  # the diagonal is the Hessian, or the directions are not sorted
        together = classes if self.link.kind == "softmax" else 1
        strong = int((diagonal.amax(0) > 2 * self.weight_decay).sum())
        return min(dim, strong, int(math.sqrt(self.operations / together)), int(math.sqrt(_BLOCK / classes / together)))

    def _factor(self, weight: Tensor, exact: int) -> Tensor | None:
        """The Cholesky factor of the Hessian in the first directions; None if rounding errors exceed λ, or for none."""
        if not exact:
            return None
        classes, together = len(weight), self.link.kind == "softmax"
        own = weight.new_zeros(classes * exact, exact)
        pairs = weight.new_zeros(*(2 * [classes * exact if together else 0]))
        for features, mean in self._blocks(weight, classes * exact):
            first = features[:, :exact]
            if together:
                product = (mean[:, :, None] * first[:, None]).flatten(1)
                pairs.addmm_(product.T, product, alpha=-1)
            else:
                product = (self.link.variances(mean, None)[:, :, None] * first[:, None]).flatten(1)
            own.addmm_(product.T, first)
        block = own.view(classes, exact, exact)
        if together:
            at = torch.arange(classes)
            pairs.view(classes, exact, classes, exact)[at, :, at] += block
            block = pairs
        block = block * (self.link.scale / len(self.features))
        block.diagonal(dim1=-2, dim2=-1).add_(self.weight_decay)
        factor, failed = torch.linalg.cholesky_ex(block)
        return None if bool(failed.any()) else factor

    def _blocks(self, weight: Tensor, width: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The examples' features and expected targets, in blocks with room for ``width`` more numbers per example."""
        size = max(1, 2**22 // max(width, *weight.shape))
        for features in self.features.split(size):
            yield features, self.link.mean(features @ weight.T)


def operations_once(count: int, dim: int) -> float:
    """Multiplications before the first approximate inverse: the features' second moment, its eigenvectors, rotation."""
    sampled = min(count, max(1, _NUMBERS // dim))
    side = min(sampled, dim)
    return 0.0 if side > _ROTATED else 2.0 * sampled * dim * side + 6.0 * side**3


def _rotated(features: Tensor) -> tuple[Tensor, Tensor]:
    """The features in orthonormal directions, and these as columns, the strongest first; no more than examples."""
    span = None
    if len(features) < features.shape[1]:
        span, triangle = torch.linalg.qr(features.T)
        features = triangle.T
    directions = eigenpairs(features.T @ features)[1].flip(1)
    return features @ directions, directions if span is None else span @ directions


def _sample(rows: Rows) -> tuple[Tensor, int]:
    """Features of evenly spread training examples, [example, dim], and how many examples there are."""
    taken: list[Tensor] = []
    every, count, held = 1, 0, 0
    for features, _ in rows():
        some = features[-count % every :: every]
        taken.append(some)
        count, held = count + len(features), held + some.numel()
        while held > _NUMBERS:  # keep half of them
            every *= 2
            taken = [torch.cat(taken)[::2].clone()]
            held = taken[0].numel()
    return torch.cat(taken), count
