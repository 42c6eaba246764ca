"""Gradients of a parameter that is used in different ways, such as an embedding table tied to the output layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.gradients.part import Part
from lightning_influence.numerics.projections import Sketch

# Examples per block when squared norms are read off the diagonal of a block's inner products with itself.
_DIAGONAL = 8


@dataclass(frozen=True, eq=False)
class SumOfParts(Part):
    """The sum of parts of different forms, ``terms``."""

    terms: tuple[Part, ...]

    @property
    def like(self) -> Tensor:
        """Any tensor of this part: its dtype and device."""
        return self.terms[0].like

    def slice(self, rows: slice) -> "SumOfParts":
        """The same for some of the examples."""
        return SumOfParts(tuple(term.slice(rows) for term in self.terms))

    def scaled(self, factor: Tensor) -> "SumOfParts":
        """Each example's gradient times its own number."""
        return SumOfParts(tuple(term.scaled(factor) for term in self.terms))

    def dense(self) -> tuple[Tensor, ...]:
        """[example, *shape] for each parameter."""
        rows = tuple(self.like.new_zeros(len(self), *shape) for shape in self.shapes())
        self.add_to(rows)
        return rows

    def accumulate_dot(self, other: Part, out: Tensor) -> None:
        """``out[i, j] += <gradient i of self, gradient j of other>``."""
        for mine in self.terms:
            for theirs in other.terms if isinstance(other, SumOfParts) else (other,):
                mine.accumulate_dot(theirs, out)

    def norm2(self) -> Tensor:
        """[example]: squared length of each example's gradient."""
        norms = []
        for start in range(0, len(self), _DIAGONAL):
            block = self.slice(slice(start, start + _DIAGONAL))
            product = self.like.new_zeros(len(block), len(block))
            block.accumulate_dot(block, product)
            norms.append(product.diagonal())
        return torch.cat(norms) if norms else self.like.new_zeros(0)

    def times(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: inner product of each example's gradient with one parameter-shaped vector."""
        return torch.stack([term.times(vectors) for term in self.terms]).sum(0)

    def times_own(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: the inner product of each example's gradient with its own vector."""
        return torch.stack([term.times_own(vectors) for term in self.terms]).sum(0)

    def times_each(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[vector, example]: inner products with several vectors."""
        return torch.stack([term.times_each(vectors) for term in self.terms]).sum(0)

    def operations(self, n_vectors: int) -> int:
        """Multiply-adds per example of ``times_each``."""
        return sum(term.operations(n_vectors) for term in self.terms)

    def add_to(self, rows: tuple[Tensor, ...]) -> None:
        """Add the dense gradients to ``rows``."""
        for term in self.terms:
            term.add_to(rows)

    def total(self) -> tuple[Tensor, ...]:
        """The sum over the examples, parameter-shaped."""
        return tuple(torch.stack(of_one).sum(0) for of_one in zip(*(t.total() for t in self.terms), strict=True))

    def query_bytes(self, n_queries: int) -> int:
        """The bytes that one example takes while its block is multiplied with many others."""
        return sum(term.query_bytes(n_queries) for term in self.terms)

    def merged(self, other: Part) -> "Part | None":
        """Add a term, merged with one of the same form if there is one."""
        for i, term in enumerate(self.terms):
            merged = term.merged(other)
            if merged is not None:
                return SumOfParts((*self.terms[:i], merged, *self.terms[i + 1 :]))
        return SumOfParts((*self.terms, other))

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each parameter."""
        return self.terms[0].shapes()

    def projected(self, sketches: Sequence[Sketch]) -> tuple[Part, ...]:
        """The projected gradients: the sum of the projected terms."""
        return tuple(sum_of(of_one) for of_one in zip(*(t.projected(sketches) for t in self.terms), strict=True))

    def per_parameter(self) -> tuple[Part, ...]:
        """One part per parameter."""
        return tuple(sum_of(of_one) for of_one in zip(*(t.per_parameter() for t in self.terms), strict=True))

    def finite(self) -> Tensor:
        """[example]: whether every number is finite."""
        return torch.stack([term.finite() for term in self.terms]).all(0)


def sum_of(parts: Sequence[Part]) -> Part:
    """The sum of parts of the same parameters, by halves, so that of many parts each is copied only a few times."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    left, right = sum_of(parts[:half]), sum_of(parts[half:])
    return left.merged(right) or SumOfParts((left, right))
