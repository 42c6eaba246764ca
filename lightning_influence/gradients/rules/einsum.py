"""The rule for ``einsum`` of activations with a weight, by the letters that they share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.derivations import Selection
from lightning_influence.gradients.layout import Split
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.pulled import Pulled
from lightning_influence.gradients.rules.rule import LayerRule, Operands, Parts
from lightning_influence.gradients.sum_of_parts import SumOfParts

# So many matrices, of at least so many entries, are kept in factors; others are small enough to be dense.
_MATRICES, _ENTRIES = 16, 2**10


@dataclass(frozen=True)
class Letters:
    """The letters of an equation, by what they are for a weight.

    Args:
        positions: of the result and the activations.
        groups: of all three: each has a matrix of its own.
        outputs: of the result and the weight.
        inputs: of the activations and the weight, summed over.
    """

    positions: str
    groups: str
    outputs: str
    inputs: str

    @classmethod
    def of(cls, weight: str, other: str, result: str) -> "Letters":
        """For the letters of the weight, of the activations and of the result."""
        return cls(
            "".join(c for c in result if c not in weight),
            "".join(c for c in weight if c in other and c in result),
            "".join(c for c in weight if c not in other),
            "".join(c for c in weight if c not in result),
        )


class _Einsum:
    def operands(self, equation: Any, *tensors: Any) -> Operands | None:
        if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
            tensors = tuple(tensors[0])
        if not isinstance(equation, str) or len(tensors) != 2 or "." in equation or "->" not in equation:
            return None
        given, result = equation.replace(" ", "").split("->")
        left, right = given.split(",")
        alone = any(c not in other + result for own, other in ((left, right), (right, left)) for c in own)
        if alone or any(len(set(letters)) < len(letters) for letters in (left, right, result)):
            return None
        leading = [
            next((i for i, c in enumerate(result) if c in weight), len(result)) for weight in (left, right)
        ]  # of the letters of the result, which the weight does not have
        options = {"left": (left, right, result), "right": (right, left, result)}
        return Operands({"left": tensors[0], "right": tensors[1]}, tensors[0], max(leading), options)

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        others = {"left": "right", "right": "left"}
        return {(role,): _part(operands, role, operands[others[role]], gradient, split) for role in wanted}


def _part(operands: Operands, role: str, other: Tensor, gradient: Tensor, split: Split) -> Part:
    own, of_other, result = operands.options[role]
    weight, letters = operands[role], Letters.of(own, of_other, result)
    sizes = dict(zip(own, weight.shape, strict=True))

    def arranged(tensor: Tensor, given: str, features: str) -> Tensor:
        """[example, position, group, feature]."""
        order = [given.index(c) for c in letters.positions + letters.groups + features]
        shape = [math.prod(sizes[c] for c in group) for group in (letters.groups, features)]
        permuted = tensor.permute(order)
        return split.positions(permuted.reshape(*permuted.shape[: len(letters.positions)], *shape), 2)

    inputs, outputs = arranged(other, of_other, letters.inputs), arranged(gradient, result, letters.outputs)
    groups, width_out, width_in = outputs.shape[2], outputs.shape[3], inputs.shape[3]
    if groups == 1 or (groups <= _MATRICES and width_in * width_out >= _ENTRIES):
        shape = width_out, width_in
        terms = [
            _within(OuterProducts(inputs[:, :, g], outputs[:, :, g], shape), own, weight, letters, g)
            for g in range(groups)
        ]
        return terms[0] if groups == 1 else SumOfParts(tuple(terms))
    rows = torch.einsum("ntgo,ntgi->ngoi", outputs, inputs)
    order = letters.groups + letters.outputs + letters.inputs
    rows = rows.reshape(len(rows), *(sizes[c] for c in order))
    return DenseRows((rows.permute(0, *(1 + order.index(c) for c in own)),))


def _within(part: OuterProducts, own: str, weight: Tensor, letters: Letters, group: int) -> Part:
    """The gradients of one matrix as those of a weight whose dimensions lie in another order."""
    shape = tuple(weight.shape)
    if own == letters.outputs + letters.inputs and len(letters.outputs) == 1:
        return replace(part, shape=shape)
    if own == letters.inputs + letters.outputs and len(letters.inputs) == 1:
        return replace(part, shape=shape, transposed=True)
    sizes = dict(zip(own, shape, strict=True))
    strides = {c: math.prod(weight.shape[i + 1 :]) for i, c in enumerate(own)}
    offset = 0
    for c in reversed(letters.groups):
        group, index = divmod(group, sizes[c])
        offset += index * strides[c]
    order = letters.outputs + letters.inputs
    size, stride = tuple(sizes[c] for c in order), tuple(strides[c] for c in order)
    return Pulled(part, Selection(shape, size, stride, offset))


EINSUM: dict[Callable[..., object], LayerRule] = {torch.einsum: _Einsum()}
