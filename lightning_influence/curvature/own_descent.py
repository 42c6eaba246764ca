"""Gradients carried back through stretches of training in the layers' eigenbases, for products with their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.curvature.curvature import PreparedCurvature
from lightning_influence.curvature.descent import Descent
from lightning_influence.curvature.factors import from_matrices, part_of, rotated
from lightning_influence.curvature.kronecker_descent import complete_descent, descend_layer
from lightning_influence.curvature.kronecker_part import Bases
from lightning_influence.curvature.layer_inverses import by_layer
from lightning_influence.curvature.own_products import in_bases, layer_slices
from lightning_influence.devices import workspace
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.queries import DenseQueries, EachQuery, QueryGradients
from lightning_influence.setting.setting import Setting

Shapes = Mapping[str, tuple[int, ...]]
# Components outside a basis are left out below this many rounding errors of the largest component.
_ROUNDING = 32


@dataclass(frozen=True, eq=False)
class LayerVectors:
    """Vectors of one layer as their coordinates in its Kronecker eigenbasis times a table.

    Args:
        bases: orthonormal.
        coordinates: [vector, k, l].
        table: [k, l].
    """

    bases: Bases
    coordinates: Tensor
    table: Tensor

    def values(self, rows: slice) -> Tensor:
        """The coordinates of some vectors with the table applied, [vector, k, l]."""
        return self.coordinates[rows] * self.table

    def into(self, bases: Bases) -> Tensor:
        """The coordinates in another basis: two matrix products a vector."""
        sides = self.bases.basis_out.T @ bases.basis_out, self.bases.basis_in.T @ bases.basis_in
        found = self.coordinates.new_empty(len(self.coordinates), sides[0].shape[1], sides[1].shape[1])
        step = max(1, workspace(self.table.device) // max(1, self.table.numel()))
        for start in range(0, len(found), step):
            rows = slice(start, start + step)
            found[rows] = rotated(self.values(rows), *sides)
        return found

    def dense(self, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
        """[vector, *shape] for each parameter."""
        matrices = rotated(self.values(slice(None)), self.bases.basis_out.T, self.bases.basis_in.T)
        return from_matrices(matrices, shapes, self.bases.transposed)


@dataclass(frozen=True, eq=False)
class OwnVectors:
    """Vectors, one for each example of a block, to be multiplied with gradients of the same example only.

    Args:
        layers: of the layers that are kept in an eigenbasis.
        rest: of all others, dense.
        shapes: of all parameters.
    """

    layers: Mapping[Names, LayerVectors]
    rest: DenseQueries
    shapes: Shapes

    def slice(self, rows: slice) -> "OwnVectors":
        """Some of the vectors."""
        layers = {names: replace(of, coordinates=of.coordinates[rows]) for names, of in self.layers.items()}
        return replace(self, layers=layers, rest=self.rest.slice(rows))

    def diagonal(self, block: Gradients) -> Tensor:
        """[example]: the inner product of each vector with the example of the same index; there are as many of both."""
        total = block._zeros(len(block))
        for names, vectors in self.layers.items():
            for rows, part in layer_slices(block, names, self.shapes):
                own = replace(vectors, coordinates=vectors.coordinates[rows])
                for few in part.in_cache():
                    total[rows][few] += next(in_bases(own.bases, part.slice(few))).times_own((own.values(few),))
        inside = {name for names in self.layers for name in names}
        others = {names: part for names, part in block.parts.items() if not inside.issuperset(names)}
        if others and self.rest.vectors:
            total += self.rest.diagonal(Gradients(others, block.groups, block.size))
        return total

    def of_layer(self, names: Names) -> Gradients:
        """These parameters' vectors as dense gradients."""
        written = dict(self.rest.vectors)
        size = len(next(iter(written.values()), ()))
        for others, vectors in self.layers.items():
            size = len(vectors.coordinates)
            if set(others) & set(names):
                written |= zip(others, vectors.dense(tuple(self.shapes[n] for n in others)), strict=True)
        return as_gradients({n: written[n] for n in names if n in written}, size)


def descend_own(
    prepared: PreparedCurvature, vectors: QueryGradients | OwnVectors, setting: Setting, descent: Descent
) -> tuple[OwnVectors, OwnVectors]:
    """F v and S^T v (see ``Descent``), in the layers' eigenbases where F and S are diagonal there."""
    shapes = {name: tuple(p.shape) for name, p in setting.engine.task.named_parameters().items()}
    layers: tuple[dict[Names, LayerVectors], ...] = ({}, {})
    rest: tuple[dict[str, Tensor], ...] = ({}, {})
    for names, tensors in by_layer(prepared).items():
        diagonal = complete_descent(names, tensors, descent)
        if diagonal is None:
            written = EachQuery(_blocks(vectors, names)).dense()
            for found, made in zip(rest, descend_layer(names, tensors, descent, written), strict=True):
                found.update(made)
            continue
        bases, tables = diagonal
        before = vectors.layers.get(names) if isinstance(vectors, OwnVectors) else None
        inside = before.into(bases) if before else _coordinates(_blocks(vectors, names), names, bases, shapes)
        if inside is not None:
            bases, inside = _trimmed(bases, inside, tensors["eigenvalues"].shape)
            for of_all, table in zip(layers, tables, strict=True):
                of_all[names] = LayerVectors(bases, inside, table[: inside.shape[1], : inside.shape[2]].to(inside))
    groups = setting.engine.groups
    moved, kept = (OwnVectors(a, DenseQueries(b, groups), shapes) for a, b in zip(layers, rest, strict=True))
    return moved, kept


def _blocks(vectors: QueryGradients | OwnVectors, names: Names) -> Sequence[Gradients]:
    """The vectors as blocks of gradients, of which those of these parameters are needed."""
    if isinstance(vectors, OwnVectors):
        return [vectors.of_layer(names)]
    return vectors.blocks if isinstance(vectors, EachQuery) else [as_gradients(vectors.dense(), len(vectors))]


def as_gradients(vectors: Mapping[str, Tensor], size: int) -> Gradients:
    """Dense vectors as a block of gradients."""
    return Gradients({(name,): DenseRows((rows,)) for name, rows in vectors.items()}, {}, size)


def _coordinates(blocks: Sequence[Gradients], names: Names, bases: Bases, shapes: Shapes) -> Tensor | None:
    """The coordinates of one layer's vectors, [vector, k, l]; None if no block has the layer."""
    parts = [part_of(block, names, shapes) for block in blocks]
    like = next((part.like for part in parts if part is not None), None)
    if like is None:
        return None
    sides = bases.basis_out.shape[1], bases.basis_in.shape[1]
    found, start = like.new_zeros(sum(len(block) for block in blocks), *sides), 0
    for block, part in zip(blocks, parts, strict=True):
        rows = found[start : start + len(block)]
        if part is not None:
            for few in part.in_cache():
                rows[few] = next(in_bases(bases, part.slice(few))).dense()[0]
        start += len(block)
    return found


def _trimmed(bases: Bases, found: Tensor, known: Sequence[int]) -> tuple[Bases, Tensor]:
    """Without the directions that complete the bases, on each side on which no vector has a component along them."""
    least = _ROUNDING * torch.finfo(found.dtype).eps * found.abs().amax((1, 2))
    rows, columns = known
    if rows < found.shape[1] and bool((found[:, rows:].abs().amax((1, 2)) <= least).all()):
        bases, found = replace(bases, basis_out=bases.basis_out[:, :rows]), found[:, :rows]
    if columns < found.shape[2] and bool((found[:, :, columns:].abs().amax((1, 2)) <= least).all()):
        bases, found = replace(bases, basis_in=bases.basis_in[:, :columns]), found[:, :, :columns]
    return bases, found.contiguous()
