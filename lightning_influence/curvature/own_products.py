"""Products of gradients with themselves through an EK-FAC inverse, in the layers' eigenbases."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.curvature.factors import as_matrices, part_of, rotated_inputs
from lightning_influence.curvature.kronecker_part import Bases
from lightning_influence.curvature.layer_inverses import LayerInverses
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part

# Examples whose gradients are taken apart at once where they lie in other parts than the layer's.
_FEW = 16


def own_products(layers: LayerInverses, gradients: Gradients, powers: Sequence[int]) -> Tensor:
    r"""[power, example]: :math:`g^\top A^{-p} g` for each gradient and power p of the inverse.

    A layer's gradient is rotated into its eigenbasis, where the inverse is a table: the sum of squared entries times
    the table's. Nothing is rotated back.
    """
    total = gradients._zeros(len(powers), len(gradients))
    for names in layers:
        inverse = layers.inverses.get(names)
        tables = layers.diagonals[names] if inverse is None else (inverse.table,)
        weights = tuple(torch.stack([table**power for power in powers]) for table in tables)
        for rows, part in layer_slices(gradients, names, layers.shapes):
            if inverse is None:
                total[:, rows] += part.weighted_norm2(weights)
                continue
            for few in part.in_cache():
                inside, *outside = in_bases(inverse, part.slice(few))
                total[:, rows][:, few] += inside.weighted_norm2(weights)
                for rest in outside:
                    norms = rest.norm2()
                    total[:, rows][:, few] += torch.stack([norms * inverse.outside**power for power in powers])
    return total


def layer_slices(
    gradients: Gradients, names: Names, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[slice, Part]]:
    """The part of these parameters; of a few examples at a time where it has to be built of others."""
    step = max(1, len(gradients)) if names in gradients.parts else _FEW
    for start in range(0, len(gradients), step):
        rows = slice(start, start + step)
        part = part_of(gradients.slice(rows), names, shapes)
        if part is not None:
            yield rows, part


def in_bases(bases: Bases, part: Part) -> Iterator[Part]:
    """The gradients in the bases, then what lies outside them: orthogonal parts, none for complete bases.

    Positions are rotated one by one, or the dense gradient is, whichever takes fewer operations.
    """
    out, k = bases.basis_out.shape
    width, l = bases.basis_in.shape  # noqa: E741
    if isinstance(part, OuterProducts):
        t = part.outputs.shape[1]
        if t * (out * k + width * l + k * l) <= t * out * width + out * width * l + out * k * l or t == 1:
            yield from _positions_in_bases(bases, part)
            return
    matrices = as_matrices(part.dense(), bases.transposed)
    right = matrices @ bases.basis_in
    inside = bases.basis_out.T @ right
    yield DenseRows((inside,))
    if l < width:
        yield DenseRows((matrices - right @ bases.basis_in.T,))
    if k < out:
        yield DenseRows((right - bases.basis_out @ inside,))


def _positions_in_bases(bases: Bases, part: OuterProducts) -> Iterator[Part]:
    basis_out, basis_in = bases.basis_out, bases.basis_in
    outputs, inputs = part.scaled_outputs(), part.inputs
    left, right = outputs @ basis_out, rotated_inputs(inputs, part.bias, basis_in)
    yield OuterProducts(right, left, (left.shape[2], right.shape[2]))
    if bases.complete:
        return
    if part.bias:
        inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)
    if basis_in.shape[1] < basis_in.shape[0]:
        rest = inputs - right @ basis_in.T
        yield OuterProducts(rest, outputs, (outputs.shape[2], rest.shape[2]))
    if basis_out.shape[1] < basis_out.shape[0]:
        rest = outputs - left @ basis_out.T
        yield OuterProducts(right, rest, (rest.shape[2], right.shape[2]))
