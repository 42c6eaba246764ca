"""Rules for matrix products with a weight: ``linear``, ``addmm``, ``matmul``, and grouped ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.derivations import Selection
from lightning_influence.gradients.layout import LayoutMismatch, Split
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.pulled import Pulled
from lightning_influence.gradients.rules.rule import LayerRule, Operands, Parts
from lightning_influence.gradients.sum_of_parts import SumOfParts


def affine_parts(operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
    """The outer products of inputs and output gradients at all positions of each example."""
    outputs = split.positions(gradient)
    if "weight" not in wanted:
        return {("bias",): DenseRows((outputs.sum(1),))}
    inputs, shape, bias = split.positions(operands.input), tuple(operands["weight"].shape), "bias" in wanted
    part = OuterProducts(inputs, outputs, shape, bias, operands.options["transposed"])
    return {("weight", "bias") if bias else ("weight",): part}


class _Linear:
    parts = staticmethod(affine_parts)

    def operands(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Operands | None:
        if input.ndim < 2 or weight.ndim != 2:
            return None
        return Operands({"weight": weight, "bias": bias}, input, input.ndim - 1, {"transposed": False})


class _AddMM:
    """``bias + input @ weight`` with the weight stored as [in, out], as in Hugging Face's GPT-2."""

    parts = staticmethod(affine_parts)

    def operands(self, bias: Tensor, input: Tensor, weight: Tensor, **scales: Any) -> Operands | None:
        if scales or bias.shape != weight.shape[1:]:
            return None
        return Operands({"weight": weight, "bias": bias}, input, 1, {"transposed": True})


class _MatMul:
    parts = staticmethod(affine_parts)

    def operands(self, input: Tensor, weight: Tensor) -> Operands | None:
        if not isinstance(weight, Tensor) or weight.ndim != 2 or input.ndim < 2:
            return None
        return Operands({"weight": weight}, input, input.ndim - 1, {"transposed": True})


class _GroupedMM:
    """One matrix after another, each for the rows that follow those of the one before, as in a mixture of experts."""

    def operands(
        self, mat_a: Tensor, mat_b: Tensor, *, offs: Tensor | None = None, bias: Tensor | None = None, **_: Any
    ) -> Operands | None:
        if offs is None or bias is not None or mat_a.ndim != 2 or mat_b.ndim != 3:
            return None
        return Operands({"weight": mat_b}, mat_a, 1, {"ends": offs})

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        if not split.padded:
            raise LayoutMismatch("Expected rows that were taken by index, got those of a batch.")
        weight, start, terms = operands["weight"], 0, list[Part]()
        shape, entries = tuple(weight.shape), weight[0].numel()
        for matrix, end in enumerate(operands.options["ends"].tolist()):
            if end > start:
                rows = slice(start, end)
                own = affine_parts(
                    Operands({"weight": weight[matrix]}, operands.input[rows], 1, {"transposed": True}),
                    gradient[rows],
                    wanted,
                    split.of(rows),
                )["weight",]
                terms.append(Pulled(own, Selection(shape, shape[1:], (shape[2], 1), matrix * entries)))
            start = end
        return {
            ("weight",): SumOfParts(tuple(terms)) if terms else DenseRows((weight.new_zeros(split.examples, *shape),))
        }


_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)

LINEAR: dict[Callable[..., object], LayerRule] = {
    F.linear: _Linear(),
    torch.addmm: _AddMM(),
    **dict.fromkeys(_PRODUCTS, _MatMul()),
    **({torch._grouped_mm: _GroupedMM()} if hasattr(torch, "_grouped_mm") else {}),
}
