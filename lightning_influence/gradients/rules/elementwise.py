"""Rules for parameters that are added to activations, multiplied with them, or expanded over a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.layout import Layout, LayoutMismatch, split
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.rules.rule import LayerRule, Operands


def sum_broadcast(gradient: Tensor, shape: tuple[int, ...], examples: int, layout: Layout) -> Tensor:
    """Sum each example's ``gradient`` over the dimensions along which ``shape`` was broadcast: [example, *shape].

    Raises:
        LayoutMismatch: the parameter has a dimension that holds the examples.
    """
    aligned = (1,) * (gradient.ndim - len(shape)) + shape
    batch_axis = 1 if layout is Layout.SECOND else 0
    if aligned[batch_axis] != 1:
        raise LayoutMismatch(f"A parameter of shape {shape} is not shared by the {examples} examples of a batch.")
    rows = split(gradient, examples, layout)
    # [example, position, *rest]: in layout FIRST the position is a dimension of length one in place of the example's,
    # in SECOND it is the time dimension, which the parameter may span.
    target = (aligned[0] if layout is Layout.SECOND else 1, *aligned[(2 if layout is Layout.SECOND else 1) :])
    axes = [1 + axis for axis, size in enumerate(target) if size == 1 and rows.shape[1 + axis] != 1]
    return (rows.sum(axes, keepdim=True) if axes else rows).reshape(examples, *shape)


class _Sum:
    def operands(self, input: Any, other: Any, *rest: Any, **kwargs: Any) -> Operands | None:
        if rest or kwargs or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        return Operands({"left": input, "right": other}, input, max(input.ndim, other.ndim))

    def parts(
        self, operands: Operands, gradient: Tensor, wanted: frozenset[str], examples: int, layout: Layout
    ) -> dict[tuple[str, ...], Part]:
        shapes = {role: _shape(operands, role) for role in wanted}
        return {
            (role,): DenseRows((sum_broadcast(gradient, shape, examples, layout),)) for role, shape in shapes.items()
        }


class _Product:
    operands = _Sum.operands

    def parts(
        self, operands: Operands, gradient: Tensor, wanted: frozenset[str], examples: int, layout: Layout
    ) -> dict[tuple[str, ...], Part]:
        parts: dict[tuple[str, ...], Part] = {}
        for role in wanted:
            other = operands["right" if role == "left" else "left"]
            parts[role,] = DenseRows((sum_broadcast(gradient * other, _shape(operands, role), examples, layout),))
        return parts


class _Expand:
    """A parameter repeated for every example, such as a class token."""

    parts = _Sum.parts

    def operands(self, input: Tensor, *sizes: Any, **kwargs: Any) -> Operands | None:
        return None if kwargs else Operands({"left": input}, input, 3)


def _shape(operands: Operands, role: str) -> tuple[int, ...]:
    return tuple(operands[role].shape)


ELEMENTWISE: dict[Callable[..., object], LayerRule] = {
    torch.add: _Sum(),
    torch.Tensor.add: _Sum(),
    torch.Tensor.__add__: _Sum(),
    torch.Tensor.__radd__: _Sum(),
    torch.mul: _Product(),
    torch.Tensor.mul: _Product(),
    torch.Tensor.__mul__: _Product(),
    torch.Tensor.__rmul__: _Product(),
    torch.Tensor.expand: _Expand(),
}
