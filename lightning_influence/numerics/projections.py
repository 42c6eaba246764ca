"""Random projections that keep inner products on average: plain, or one factor for each side of a weight matrix."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_integer, one_of

Frame = Callable[[int, int, str], Tensor]
"""``frame(dim, size, label)``: the [dim, size] matrix of that label."""


class Sketch(ABC):
    """A linear map of one parameter's gradients to fewer numbers."""

    @abstractmethod
    def rows(self, rows: Tensor) -> Tensor:
        """[example, *shape] to [example, ...]."""


@dataclass(frozen=True, eq=False)
class Plain(Sketch):
    """One matrix on the flattened gradient.

    Args:
        matrix: [dim, entries], or None to keep the gradient as it is.
    """

    matrix: Tensor | None

    def rows(self, rows: Tensor) -> Tensor:
        """[example, *shape] to [example, dim]."""
        return rows if self.matrix is None else rows.reshape(len(rows), -1) @ self.matrix.to(rows).T


@dataclass(frozen=True, eq=False)
class Kronecker(Sketch):
    r"""A matrix on each side: :math:`M \mapsto L M R^\top`, so that :math:`g a^\top` becomes :math:`(L g)(R a)^\top`.

    The weight counts as a matrix: its first dimension by all the others.

    Args:
        left: [dim, first dimension], or None to keep that side as it is.
        right: [dim, other dimensions], or None.
    """

    left: Tensor | None
    right: Tensor | None

    def on_left(self, vectors: Tensor) -> Tensor:
        """[..., first dimension] to [..., dim]."""
        return vectors if self.left is None else vectors @ self.left.to(vectors).T

    def on_right(self, vectors: Tensor) -> Tensor:
        """[..., other dimensions] to [..., dim]."""
        return vectors if self.right is None else vectors @ self.right.to(vectors).T

    def rows(self, rows: Tensor) -> Tensor:
        """[example, *shape] to [example, dim, dim]."""
        matrices = rows.reshape(len(rows), rows.shape[1], -1)
        return self.on_left(self.on_right(matrices).transpose(1, 2)).transpose(1, 2)


def gaussian(generator: torch.Generator, dim: int, size: int) -> Tensor:
    """[dim, size] of independent normal numbers of variance 1 / dim."""
    return torch.randn(dim, size, generator=generator, dtype=torch.float64) / math.sqrt(dim)


def orthogonal(generator: torch.Generator, dim: int, size: int) -> Tensor:
    """[dim, size]: the first rows of a random rotation, times the root of size / dim; less noisy than ``gaussian``."""
    frame, triangle = torch.linalg.qr(torch.randn(size, dim, generator=generator, dtype=torch.float64))
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)  # QR's own signs are not uniform
    return (frame * signs).T * math.sqrt(size / dim)


_DRAWS = {"gaussian": gaussian, "orthogonal": orthogonal}


@dataclass(frozen=True)
class RandomProjection:
    """Gradients as ``dim`` numbers a parameter, whose inner products are on average those of the gradients.

    With ``structure="kronecker"`` a layer's gradient is never built at full size: the inputs and the output gradients
    that it is made of are projected, each by its own matrix. A parameter of no more than ``dim`` entries stays itself.

    Source: Pruthi, Liu, Kale, Sundararajan. Estimating Training Data Influence by Tracing Gradient Descent.
    NeurIPS 2020, appendix (plain, and per layer); Choe et al. What is Your Data Worth to GPT? 2024 (both sides).
    Cost: ``"plain"`` holds dim × entries numbers a parameter, ``"kronecker"`` about √dim × (rows + columns).

    Args:
        dim: numbers a parameter, at most.
        structure: ``"kronecker"`` or ``"plain"``.
        entries: ``"orthogonal"`` rows, or independent ``"gaussian"`` ones.
        seed: the same for queries and training examples, or their products would mean nothing.

    Raises:
        ValueError: other values.

    Example:
        >>> from lightning_influence import RandomProjection, TracInCP
        >>> TracInCP(projection=RandomProjection(256)).projection.dim
        256
    """

    dim: int
    structure: Literal["kronecker", "plain"] = "kronecker"
    entries: Literal["orthogonal", "gaussian"] = "orthogonal"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("dim", self.dim)
        one_of("structure", self.structure, ("kronecker", "plain"))
        one_of("entries", self.entries, ("orthogonal", "gaussian"))

    def frame(self, dim: int, size: int, label: str) -> Tensor:
        """The [dim, size] matrix of that label: independent of those of other labels and other seeds."""
        digest = hashlib.sha256(f"{self.seed}/{label}".encode()).digest()
        return _DRAWS[self.entries](torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")), dim, size)


@dataclass
class Projector:
    """The sketches of a projection by parameter, drawn when first met and kept.

    Args:
        projection: which.
    """

    projection: RandomProjection
    _drawn: dict[tuple[str, tuple[int, ...]], Sketch] = field(default_factory=dict)

    def __call__(self, name: str, shape: Sequence[int], like: Tensor) -> Sketch:
        """The sketch of one parameter, in the dtype and on the device of ``like``."""
        key = name, tuple(shape)
        if key not in self._drawn:
            self._drawn[key] = self._draw(name, key[1], like)
        return self._drawn[key]

    def _draw(self, name: str, shape: tuple[int, ...], like: Tensor) -> Sketch:
        dim, entries = self.projection.dim, math.prod(shape)
        if entries <= dim:
            return Plain(None)
        if self.projection.structure == "plain" or len(shape) < 2:
            return Plain(self.projection.frame(dim, entries, name).to(like))
        rows, columns = shape[0], entries // shape[0]
        left, right = sides(dim, rows, columns)
        return Kronecker(
            None if left == rows else self.projection.frame(left, rows, f"{name}/left").to(like),
            None if right == columns else self.projection.frame(right, columns, f"{name}/right").to(like),
        )


def sides(dim: int, rows: int, columns: int) -> tuple[int, int]:
    """How many numbers each side of a matrix keeps: as equal as they can be, with a product of at most ``dim``."""
    left = min(rows, math.isqrt(dim))
    right = min(columns, dim // left)
    return min(rows, dim // right), right
