"""Random projections that preserve inner products on average: one matrix, or a Kronecker product of two."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_integer, one_of
from lightning_influence.hints import HintedArguments


class Sketch(ABC):
    """A linear map from one parameter's gradients to fewer numbers."""

    @abstractmethod
    def rows(self, rows: Tensor) -> Tensor:
        """Map [example, *shape] to [example, ...]."""


@dataclass(frozen=True, eq=False)
class PlainSketch(Sketch):
    """One matrix applied to the flattened gradient.

    Args:
        matrix: [dim, entries], or None to leave the gradient unchanged.
    """

    matrix: Tensor | None

    def rows(self, rows: Tensor) -> Tensor:
        """Map [example, *shape] to [example, dim]."""
        return rows if self.matrix is None else rows.reshape(len(rows), -1) @ self.matrix.to(rows).T


@dataclass(frozen=True, eq=False)
class KroneckerSketch(Sketch):
    r"""A matrix on each side: :math:`M \mapsto L M R^\top`, so that :math:`g a^\top` becomes :math:`(L g)(R a)^\top`.

    A parameter is taken as a matrix whose rows are its first dimension and whose columns are all others.

    Args:
        left: [dim, rows], or None to leave the rows unchanged.
        right: [dim, columns], or None to leave the columns unchanged.
    """

    left: Tensor | None
    right: Tensor | None

    def on_left(self, vectors: Tensor) -> Tensor:
        """Map [..., rows] to [..., dim]."""
        return vectors if self.left is None else vectors @ self.left.to(vectors).T

    def on_right(self, vectors: Tensor) -> Tensor:
        """Map [..., columns] to [..., dim]."""
        return vectors if self.right is None else vectors @ self.right.to(vectors).T

    def rows(self, rows: Tensor) -> Tensor:
        """Map [example, *shape] to [example, dim, dim]."""
        matrices = rows.reshape(len(rows), rows.shape[1], -1)
        return self.on_left(self.on_right(matrices).transpose(1, 2)).transpose(1, 2)


def gaussian(generator: torch.Generator, dim: int, size: int) -> Tensor:
    """[dim, size] of independent normal entries with variance 1 / dim."""
    return torch.randn(dim, size, generator=generator, dtype=torch.float64) / math.sqrt(dim)


def orthogonal(generator: torch.Generator, dim: int, size: int) -> Tensor:
    """[dim, size]: orthogonal rows of a random rotation, times √(size / dim); less noisy than ``gaussian``."""
    frame, triangle = torch.linalg.qr(torch.randn(size, dim, generator=generator, dtype=torch.float64))
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)  # QR's own signs are not uniform
    return (frame * signs).T * math.sqrt(size / dim)


_DRAWS = {"gaussian": gaussian, "orthogonal": orthogonal}


@dataclass(frozen=True)
class RandomProjection(HintedArguments):
    """A random projection of each parameter's gradient to at most ``dim`` numbers.

    Inner products of projected gradients equal those of the gradients in expectation over the seed. With
    ``structure="kronecker"`` a layer's gradient is never built at full size: its two factors, inputs and output
    gradients, are each projected by a matrix of their own. A parameter with at most ``dim`` entries is not projected.

    Source: Pruthi, Liu, Kale, Sundararajan. Estimating Training Data Influence by Tracing Gradient Descent.
    NeurIPS 2020, appendix (``"plain"``, per layer); Choe et al. What is Your Data Worth to GPT? 2024 (``"kronecker"``).
    Cost: the memory of the matrices: dim × entries numbers per parameter with ``"plain"``, about √dim × (rows +
    columns) with ``"kronecker"``.

    Args:
        dim: the most numbers that are kept per parameter.
        structure: ``"kronecker"`` (one matrix per side of a weight) or ``"plain"`` (one matrix per parameter).
        entries: ``"orthogonal"`` rows, or independent ``"gaussian"`` entries.
        seed: of the matrices, which are the same for queries and training examples.

    Raises:
        ValueError: ``dim`` is not a positive integer, or another argument is none of its options.

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
        """The random matrix [dim, size] of a label, independent of the matrices of other labels and seeds."""
        digest = hashlib.sha256(f"{self.seed}/{label}".encode()).digest()
        return _DRAWS[self.entries](torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")), dim, size)


@dataclass
class Projector:
    """Draws the sketch of each parameter when it is first used, and keeps it.

    Args:
        projection: defines the sketches.
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
            return PlainSketch(None)
        if self.projection.structure == "plain" or len(shape) < 2:
            return PlainSketch(self.projection.frame(dim, entries, name).to(like))
        rows, columns = shape[0], entries // shape[0]
        left, right = split_dim(dim, rows, columns)
        return KroneckerSketch(
            None if left == rows else self.projection.frame(left, rows, f"{name}/left").to(like),
            None if right == columns else self.projection.frame(right, columns, f"{name}/right").to(like),
        )


def split_dim(dim: int, rows: int, columns: int) -> tuple[int, int]:
    """How many numbers to keep for the rows and for the columns: nearly equal, with a product of at most ``dim``."""
    left = min(rows, math.isqrt(dim))
    right = min(columns, dim // left)
    return min(rows, dim // right), right
