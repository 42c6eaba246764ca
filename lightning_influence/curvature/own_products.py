"""Products of gradients with themselves through an EK-FAC inverse, in the layers' eigenbases."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.curvature.factors import as_matrices, part_of, rotated_inputs
from lightning_influence.curvature.kronecker_part import KroneckerInverse
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
        for rows, part in _slices(gradients, names, layers.shapes):
            if inverse is None:
                total[:, rows] += part.weighted_norm2(weights)
                continue
            for few in part.in_cache():
                inside, *outside = _rotated(inverse, part.slice(few))
                total[:, rows][:, few] += inside.weighted_norm2(weights)
                for rest in outside:
                    norms = rest.norm2()
                    total[:, rows][:, few] += torch.stack([norms * inverse.outside**power for power in powers])
    return total


def _slices(gradients: Gradients, names: Names, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[slice, Part]]:
    """The part of these parameters; of a few examples at a time where it has to be built of others."""
    step = max(1, len(gradients)) if names in gradients.parts else _FEW
    for start in range(0, len(gradients), step):
        rows = slice(start, start + step)
        part = part_of(gradients.slice(rows), names, shapes)
        if part is not None:
            yield rows, part


def _rotated(inverse: KroneckerInverse, part: Part) -> list[Part]:
    """The gradients in the bases, and what lies outside them: orthogonal parts, none for complete bases.

    Positions are rotated one by one, or the dense gradient is, whichever takes fewer operations.
    """
    out, k = inverse.basis_out.shape
    width, l = inverse.basis_in.shape  # noqa: E741
    if isinstance(part, OuterProducts):
        t = part.outputs.shape[1]
        if t * (out * k + width * l + k * l) <= t * out * width + out * width * l + out * k * l or t == 1:
            return _rotated_positions(inverse, part)
    matrices = as_matrices(part.dense(), inverse.transposed)
    right = matrices @ inverse.basis_in
    inside = inverse.basis_out.T @ right
    found: list[Part] = [DenseRows((inside,))]
    if l < width:
        found.append(DenseRows((matrices - right @ inverse.basis_in.T,)))
    if k < out:
        found.append(DenseRows((right - inverse.basis_out @ inside,)))
    return found


def _rotated_positions(inverse: KroneckerInverse, part: OuterProducts) -> list[Part]:
    basis_out, basis_in = inverse.basis_out, inverse.basis_in
    outputs, inputs = part.scaled_outputs(), part.inputs
    left, right = outputs @ basis_out, rotated_inputs(inputs, part.bias, basis_in)
    found: list[Part] = [OuterProducts(right, left, tuple(inverse.table.shape))]
    if inverse.complete:
        return found
    if part.bias:
        inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)
    if basis_in.shape[1] < basis_in.shape[0]:
        rest = inputs - right @ basis_in.T
        found.append(OuterProducts(rest, outputs, (outputs.shape[2], rest.shape[2])))
    if basis_out.shape[1] < basis_out.shape[0]:
        rest = outputs - left @ basis_out.T
        found.append(OuterProducts(right, rest, (rest.shape[2], right.shape[2])))
    return found
