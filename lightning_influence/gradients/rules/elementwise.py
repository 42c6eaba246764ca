"""Rules for parameters that are added to activations, multiplied with them, or expanded over a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.layout import Layout, LayoutMismatch, Split
from lightning_influence.gradients.rules.rule import LayerRule, Operands, Parts
from lightning_influence.module.torch_functions import functions_named


def sum_broadcast(gradient: Tensor, shape: torch.Size, split: Split) -> Tensor:
    """Sum each example's ``gradient`` over the dimensions along which ``shape`` was broadcast: [example, *shape].

    Raises:
        LayoutMismatch: the parameter has a dimension that holds the examples.
    """
    aligned = (1,) * (gradient.ndim - len(shape)) + shape
    second = split.layout is Layout.SECOND
    if aligned[1 if second else 0] != 1:
        raise LayoutMismatch(f"A parameter of shape {shape} is not shared by the {split.examples} examples of a batch.")
    rows = split(gradient)
    # [example, position, *rest]: in layout FIRST the position is a dimension of length one in place of the example's,
    # in SECOND it is the time dimension, which the parameter may span.
    target = (aligned[0], *aligned[2:]) if second else (1, *aligned[1:])
    axes = [1 + axis for axis, size in enumerate(target) if size == 1 and rows.shape[1 + axis] != 1]
    return (rows.sum(axes, keepdim=True) if axes else rows).reshape(split.examples, *shape)


_Gradient = Callable[[Tensor, Any, Any], Tensor]
"""By an operand, before it is summed: of the gradient by the result, and the left and right operand."""


class _Broadcast:
    """A function of two operands, entry by entry.

    Args:
        by: the gradients by the left and the right operand.
    """

    def __init__(self, *by: _Gradient) -> None:
        self.by = dict(zip(("left", "right"), by, strict=True))

    def operands(self, input: Any, other: Any, *rest: Any, **kwargs: Any) -> Operands | None:
        if rest or kwargs or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        return Operands({"left": input, "right": other}, input, max(input.ndim, other.ndim))

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        left, right = operands["left"], operands.parameters.get("right")
        return {
            (role,): DenseRows((sum_broadcast(self.by[role](gradient, left, right), operands[role].shape, split),))
            for role in wanted
        }


class _Expand(_Broadcast):
    """A parameter repeated for every example, such as a class token."""

    def operands(self, input: Tensor, *sizes: Any, **kwargs: Any) -> Operands | None:
        return None if kwargs else Operands({"left": input}, input, 3)


_same: _Gradient = lambda g, left, right: g  # noqa: E731
_SUM, _DIFFERENCE = _Broadcast(_same, _same), _Broadcast(_same, lambda g, left, right: -g)
_QUOTIENT = _Broadcast(lambda g, left, right: g / right, lambda g, left, right: -g / right * left / right)
_PRODUCT = _Broadcast(lambda g, left, right: g * right, lambda g, left, right: g * left)

ELEMENTWISE: dict[Callable[..., object], LayerRule] = {
    **dict.fromkeys(functions_named("add") | {Tensor.__add__, Tensor.__radd__}, _SUM),
    **dict.fromkeys(functions_named("sub") | {Tensor.__sub__}, _DIFFERENCE),
    **dict.fromkeys(functions_named("div true_divide") | {Tensor.__truediv__}, _QUOTIENT),
    **dict.fromkeys(functions_named("mul") | {Tensor.__mul__, Tensor.__rmul__}, _PRODUCT),
    torch.Tensor.expand: _Expand(_same, _same),
}
