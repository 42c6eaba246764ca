"""Rules for matrix products with a weight: ``linear``, ``addmm``, ``matmul``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.layout import Split
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.rules.rule import LayerRule, Operands, Parts


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


_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)

LINEAR: dict[Callable[..., object], LayerRule] = {
    F.linear: _Linear(),
    torch.addmm: _AddMM(),
    **dict.fromkeys(_PRODUCTS, _MatMul()),
}
