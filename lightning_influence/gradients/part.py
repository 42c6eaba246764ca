"""The per-sample gradients of one parameter, or of a weight and its bias, for a block of examples."""

import builtins
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_influence.devices import workspace
from lightning_influence.numerics.projections import Sketch

# An element-wise pass over a tensor costs about this many multiply-adds of a matrix product per element.
TRAFFIC = 12
# Dense gradients to build at once: enough for a full-speed matrix product with them.
ROWS = 64
# A larger weight, as of a vocabulary, is taken in strips of a few rows.
WHOLE = 2**22


class Part(ABC):
    """Per-sample gradients of one parameter (or of a weight and its bias), in the form that is cheapest to multiply."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """Any tensor of this part, [example, ...]: its length, dtype and device."""

    def __len__(self) -> int:
        return len(self.like)

    @abstractmethod
    def slice(self, rows: slice) -> "Part":
        """The same for some of the examples."""

    @abstractmethod
    def scaled(self, factor: Tensor) -> "Part":
        """Each example's gradient times its factor, ``factor`` [example]."""

    @abstractmethod
    def dense(self) -> tuple[Tensor, ...]:
        """[example, *shape] for each parameter."""

    @abstractmethod
    def accumulate_dot(self, other: "Part", out: Tensor) -> None:
        """``out[i, j] += <gradient i of self, gradient j of other>``."""

    @abstractmethod
    def norm2(self) -> Tensor:
        """[example]: squared length of each example's gradient."""

    @abstractmethod
    def times(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: inner product of each example's gradient with one parameter-shaped vector."""

    def times_each(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[vector, example]: the inner products with several vectors, [vector, *shape] for each parameter."""
        return torch.stack([self.times(tuple(v[i] for v in vectors)) for i in range(len(vectors[0]))])

    def operations(self, n_vectors: int) -> int:
        """Multiply-adds per example of ``times_each``."""
        return n_vectors * self.entries()

    def add_to(self, rows: tuple[Tensor, ...]) -> None:
        """Add the dense gradients to ``rows``, [example, *shape] for each parameter."""
        for row, own in zip(rows, self.dense(), strict=True):
            row.add_(own)

    def adding_operations(self) -> int:
        """Multiply-adds per example of ``add_to``."""
        return self.entries()

    @abstractmethod
    def total(self) -> tuple[Tensor, ...]:
        """The sum over the examples, parameter-shaped."""

    def times_own(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: the inner product of each example's gradient with its own vector, [example, *shape] each."""
        found = self.like.new_zeros(len(self))
        for rows in self.in_cache():
            for mine, theirs in zip(self.slice(rows).dense(), vectors, strict=True):
                found[rows] += torch.linalg.vecdot(flat(mine), flat(theirs[rows].to(mine)))
        return found

    def own_dot(self, other: "Part", entries: tuple[Tensor, ...] | None = None) -> Tensor:
        """[example]: the inner product of each example's gradient with that of the same index in another part.

        Args:
            other: gradients of as many examples.
            entries: a factor for every entry, [*shape] for each parameter; None: 1.
        """
        found = self.like.new_zeros(len(self))
        for rows in self.in_cache():
            mine = self.slice(rows).dense()
            if entries is not None:
                mine = tuple(m * e.to(m) for m, e in zip(mine, entries, strict=True))
            found[rows] += other.slice(rows).times_own(mine).to(found)
        return found

    def weighted_norm2(self, weights: tuple[Tensor, ...]) -> Tensor:
        """[weighting, example]: sums of squared entries times weights, [weighting, *shape] for each parameter."""
        found = self.like.new_zeros(len(weights[0]), len(self))
        for rows in self.in_cache():
            for mine, weight in zip(self.slice(rows).dense(), weights, strict=True):
                found[:, rows] += flat(weight) @ flat(mine).square().T
        return found

    @property
    def elements(self) -> int:
        """The elements of the largest tensor that is made of one example for its dense gradient."""
        return sum(math.prod(shape) for shape in self.shapes())

    def in_cache(self) -> Iterator[builtins.slice]:
        """Slices of the examples whose dense gradients fit in a CPU cache, or in a part of an accelerator's memory."""
        step = max(1, workspace(self.like.device) // max(1, self.elements))
        for start in range(0, len(self), step):
            yield builtins.slice(start, min(start + step, len(self)))

    def squares(self) -> tuple[Tensor, ...]:
        """The sum over the examples of squared entries, parameter-shaped."""
        found: tuple[Tensor, ...] | None = None
        for start in range(0, len(self), 16):
            rows = self.slice(slice(start, start + 16)).dense()
            new = tuple(r.square().sum(0) for r in rows)
            found = new if found is None else tuple(a + b for a, b in zip(found, new, strict=True))
        return found or ()

    @abstractmethod
    def query_bytes(self, n_queries: int) -> int:
        """The bytes that one example takes while its block is multiplied with many others, as queries are."""

    def stored_bytes(self) -> int:
        """The bytes of the part's tensors."""
        return len(self) * self.query_bytes(1)

    @abstractmethod
    def merged(self, other: "Part") -> "Part | None":
        """The sum of the gradients of two uses of the same parameters; None if their forms cannot be merged."""

    def per_parameter(self) -> "tuple[Part, ...]":
        """The same gradients with one part per parameter."""
        return (self,)

    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each parameter."""

    def entries(self) -> int:
        """The number of entries of a dense gradient."""
        return sum(math.prod(shape) for shape in self.shapes())

    @abstractmethod
    def projected(self, sketches: Sequence[Sketch]) -> "tuple[Part, ...]":
        """The projected gradients, with one sketch and one part per parameter."""

    @abstractmethod
    def finite(self) -> Tensor:
        """[example]: whether every number is finite."""


def one_row_per_example(factor: Tensor, like: Tensor) -> Tensor:
    """``factor`` [example] shaped to multiply ``like`` [example, ...]."""
    return factor.to(like).view(-1, *[1] * (like.ndim - 1))


def flat(rows: Tensor) -> Tensor:
    """[example, entries], also for parameters without dimensions."""
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]
