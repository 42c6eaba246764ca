"""Rules for matrix products with a weight: ``linear``, ``addmm``, ``matmul``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.layout import Layout, split
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.rules.rule import LayerRule, Operands


def affine_parts(
    operands: Operands, gradient: Tensor, wanted: frozenset[str], examples: int, layout: Layout
) -> dict[tuple[str, ...], Part]:
    """The outer products of inputs and output gradients at all positions of each example."""
    outputs = split(gradient, examples, layout).reshape(examples, -1, gradient.shape[-1])
    if "weight" not in wanted:
        return {("bias",): DenseRows((outputs.sum(1),))}
    inputs = split(operands.input, examples, layout).reshape(examples, -1, operands.input.shape[-1])
    bias = "bias" in wanted
    part = OuterProducts(
        inputs, outputs, tuple(operands["weight"].shape), bias, transposed=operands.options["transposed"]
    )
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


LINEAR: dict[Callable[..., object], LayerRule] = {
    F.linear: _Linear(),
    torch.addmm: _AddMM(),
    torch.matmul: _MatMul(),
    torch.mm: _MatMul(),
    torch.Tensor.matmul: _MatMul(),
    torch.Tensor.mm: _MatMul(),
    torch.Tensor.__matmul__: _MatMul(),
}
