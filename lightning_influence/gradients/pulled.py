"""Gradients of the parameters that a weight is computed from, kept as gradients by the weight."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.devices import workspace
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.derivations import Derivation, Elementwise, Selection
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part, flat
from lightning_influence.numerics.projections import Sketch


@dataclass(frozen=True, eq=False)
class Pulled(Part):
    r"""J^T times gradients by a computed weight, for J its derivative: built densely only where it must be.

    Of an inner product of two, :math:`\langle J_q^\top g, J^\top h \rangle = \langle J J_q^\top g, h \rangle`, the
    left side is made once for a block of queries, and h stays in its factors.

    Args:
        part: the gradients by the weight.
        derivation: how the weight is computed.
    """

    part: Part
    derivation: Derivation
    _kept: dict[Hashable, tuple[Derivation, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def like(self) -> Tensor:
        """Any tensor of this part: its dtype and device."""
        return self.part.like

    @property
    def elements(self) -> int:
        """The elements of the largest tensor that is made of one example for its dense gradient."""
        return max(super().elements, self.part.elements)

    def slice(self, rows: slice) -> "Pulled":
        """The same for some of the examples."""
        return Pulled(self.part.slice(rows), self.derivation)

    def scaled(self, factor: Tensor) -> "Pulled":
        """Each example's gradient times its own number."""
        return Pulled(self.part.scaled(factor), self.derivation)

    def dense(self) -> tuple[Tensor, ...]:
        """[example, *shape] for each parameter."""
        return self.derivation.back(self.part.dense()[0])

    @cached_property
    def _query_rows(self) -> tuple[Tensor, ...]:
        """The dense gradients of a block that is multiplied with many others, built once."""
        return self.dense()

    def _forward(self, derivation: Derivation) -> Tensor:
        """The same, taken forward by the derivative of another block's weight."""
        if derivation.key not in self._kept:
            self._kept.clear()
            self._kept[derivation.key] = derivation, derivation.forward(self._query_rows)
        return self._kept[derivation.key][1]

    def accumulate_dot(self, other: Part, out: Tensor) -> None:
        """``out[i, j] += <gradient i of self, gradient j of other>``."""
        if not isinstance(other, Pulled):
            out += other.times_each(self._query_rows)
            return
        mine, theirs = self.derivation, other.derivation
        if isinstance(mine, Selection) and isinstance(theirs, Selection):
            if mine == theirs:
                self.part.accumulate_dot(other.part, out)
                return
            if not mine.overlaps(theirs):
                return
        if isinstance(mine, Elementwise) and theirs.key == mine.key and self._accumulate_tiles(mine, other, out):
            return
        out += other.part.times_each((self._forward(theirs),))

    def _accumulate_tiles(self, derivation: Elementwise, other: "Pulled", out: Tensor) -> bool:
        """The same in factors, for a mask of few distinct rows and columns; whether it can be done."""
        sides: list[tuple[Tensor, ...]] = []
        for part in (self.part, other.part):
            if not isinstance(part, OuterProducts) or part.outputs.shape[1] > 1:
                return False
            pair = part.inputs[:, 0], part.scaled_outputs()[:, 0]
            sides.append(pair[::-1] if part.transposed else pair)
        if (tiles := derivation.tiles) is None:
            return False
        table = tiles.table.to(out).square()
        step = max(1, workspace(out.device) // max(1, len(self) * sum(table.shape)))
        for start in range(0, len(other), step):
            (a, g), (b, h) = sides[0], [side[start : start + step] for side in sides[1]]
            by_columns = torch.bmm(_grouped(a, tiles.columns), _grouped(b, tiles.columns).mT)
            by_rows = torch.bmm(_grouped(g, tiles.rows), _grouped(h, tiles.rows).mT)
            by_rows *= (table @ by_columns.flatten(1)).view_as(by_rows)
            out[:, start : start + step] += by_rows.sum(0)
        return True

    def norm2(self) -> Tensor:
        """[example]: squared length of each example's gradient."""
        if isinstance(self.derivation, Selection):
            return self.part.norm2()
        if isinstance(self.derivation, Elementwise):
            return self.part.weighted_norm2((self.derivation.factor.to(self.like).square()[None],))[0]
        norms = self.like.new_zeros(len(self))
        for rows in self.in_cache():
            norms[rows] = torch.stack([flat(r).square().sum(1) for r in self.slice(rows).dense()]).sum(0)
        return norms

    def times(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: inner product of each example's gradient with one vector, [*shape] for each parameter."""
        return self.part.times((self.derivation.forward([v[None] for v in vectors])[0],))

    def times_each(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[vector, example]: inner products with several vectors."""
        return self.part.times_each((self.derivation.forward(vectors),))

    def operations(self, n_vectors: int) -> int:
        """Multiply-adds per example of ``times_each``."""
        return self.part.operations(n_vectors)

    def times_own(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: the inner product of each example's gradient with its own vector, [example, *shape] each."""
        return self.part.times_own((self.derivation.forward(vectors),))

    def total(self) -> tuple[Tensor, ...]:
        """The sum over the examples, parameter-shaped."""
        return tuple(t[0] for t in self.derivation.back(self.part.total()[0][None]))

    def query_bytes(self, n_queries: int) -> int:
        """The bytes that one example takes while its block is multiplied with many others."""
        held = self.part.query_bytes(n_queries)
        if isinstance(self.derivation, Selection):
            return held
        return held + (self.entries() + self.part.entries()) * self.like.element_size()

    def stored_bytes(self) -> int:
        """The bytes of the gradients by the weight."""
        return self.part.stored_bytes()

    def merged(self, other: Part) -> Part | None:
        """The sum of two uses of a weight that is computed in the same way."""
        if not isinstance(other, Pulled) or self.derivation.key != other.derivation.key:
            return None
        both = self.part.merged(other.part)
        return None if both is None else replace(self, part=both, _kept={})

    def per_parameter(self) -> tuple[Part, ...]:
        """One part per parameter."""
        if len(self.shapes()) == 1:
            return (self,)
        return tuple(Pulled(self.part, self.derivation.only(i)) for i in range(len(self.shapes())))

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each parameter."""
        return self.derivation.shapes

    def projected(self, sketches: Sequence[Sketch]) -> tuple[Part, ...]:
        """The projected gradients: dense, with one sketch and one part per parameter."""
        chunks = [
            [sketch.rows(dense) for sketch, dense in zip(sketches, self.slice(rows).dense(), strict=True)]
            for rows in (*self.in_cache(), *([] if len(self) else [slice(0)]))
        ]
        return tuple(DenseRows((torch.cat(of_one),)) for of_one in zip(*chunks, strict=True))

    def finite(self) -> Tensor:
        """[example]: whether every number is finite."""
        return self.part.finite()


def _grouped(vectors: Tensor, groups: Tensor) -> Tensor:
    """[group, example, entry of the group] of [example, entry], with zeros for the index behind the last."""
    return F.pad(vectors, (0, 1))[:, groups].transpose(0, 1)
