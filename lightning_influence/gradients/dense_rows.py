"""Dense per-sample gradients, one row per example: for small parameters and those without a factored rule."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.gradients.part import Part, flat, one_row_per_example
from lightning_influence.numerics.projections import Sketch


@dataclass(frozen=True, eq=False)
class DenseRows(Part):
    """Dense gradients: ``rows`` holds [example, *shape] for each parameter of this part."""

    rows: tuple[Tensor, ...]

    @property
    def like(self) -> Tensor:
        """Any tensor of this part: its dtype and device."""
        return self.rows[0]

    def slice(self, rows: slice) -> "DenseRows":
        """The same for some of the examples."""
        return DenseRows(tuple(r[rows] for r in self.rows))

    def scaled(self, factor: Tensor) -> "DenseRows":
        """Each example's gradient times its own number."""
        return DenseRows(tuple(r * one_row_per_example(factor, r) for r in self.rows))

    def dense(self) -> tuple[Tensor, ...]:
        """[example, *shape] for each parameter."""
        return self.rows

    def accumulate_dot(self, other: Part, out: Tensor) -> None:
        """``out[i, j] += <gradient i of self, gradient j of other>``."""
        for mine, theirs in zip(self.rows, other.dense(), strict=True):
            out.addmm_(flat(mine), flat(theirs).T)

    def norm2(self) -> Tensor:
        """[example]: squared length of each example's gradient."""
        return torch.stack([flat(r).square().sum(1) for r in self.rows]).sum(0)

    def times(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: inner product of each example's gradient with one parameter-shaped vector."""
        return torch.stack([flat(r) @ v.flatten() for r, v in zip(self.rows, vectors, strict=True)]).sum(0)

    def times_each(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[vector, example]: inner products by one matrix product per parameter."""
        return torch.stack([flat(v) @ flat(r).T for v, r in zip(vectors, self.rows, strict=True)]).sum(0)

    def total(self) -> tuple[Tensor, ...]:
        """The sum over the examples, parameter-shaped."""
        return tuple(r.sum(0) for r in self.rows)

    def query_bytes(self, n_queries: int) -> int:
        """The bytes that one example takes while its block is multiplied with many others."""
        return sum(r[0].numel() * r.element_size() for r in self.rows if len(r))

    def merged(self, other: Part) -> Part | None:
        """The sum of the gradients of two uses of the same parameters."""
        if not isinstance(other, DenseRows):
            return None
        return replace(self, rows=tuple(a + b for a, b in zip(self.rows, other.rows, strict=True)))

    def per_parameter(self) -> tuple[Part, ...]:
        """One part per parameter."""
        return tuple(DenseRows((r,)) for r in self.rows)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each parameter."""
        return tuple(tuple(r.shape[1:]) for r in self.rows)

    def projected(self, sketches: Sequence[Sketch]) -> tuple[Part, ...]:
        """The projected rows, with one sketch and one part per parameter."""
        return tuple(DenseRows((sketch.rows(r),)) for sketch, r in zip(sketches, self.rows, strict=True))

    def finite(self) -> Tensor:
        """[example]: whether every number is finite."""
        return torch.stack([flat(r.isfinite()).all(1) for r in self.rows]).all(0)
