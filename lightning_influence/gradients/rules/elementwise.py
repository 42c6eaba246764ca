"""Rules for parameters that are added to activations, multiplied with them, or expanded over a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.layout import Layout, LayoutMismatch, Split
from lightning_influence.gradients.rules.rule import LayerRule, Operands, Parts

_SUMS = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
_DIFFERENCES = (torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)
_QUOTIENTS = (torch.div, torch.Tensor.div, torch.true_divide, torch.Tensor.true_divide, torch.Tensor.__truediv__)
_PRODUCTS = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)


def sum_broadcast(gradient: Tensor, shape: tuple[int, ...], split: Split) -> Tensor:
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


class _Sum:
    def operands(self, input: Any, other: Any, *rest: Any, **kwargs: Any) -> Operands | None:
        if rest or kwargs or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        return Operands({"left": input, "right": other}, input, max(input.ndim, other.ndim))

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        return {(role,): _rows(operands[role], gradient, split) for role in wanted}


class _Product:
    operands = _Sum.operands

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        others = {"left": "right", "right": "left"}
        return {(role,): _rows(operands[role], gradient * operands[others[role]], split) for role in wanted}


class _Difference:
    operands = _Sum.operands

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        signed = {"left": gradient, "right": -gradient}
        return {(role,): _rows(operands[role], signed[role], split) for role in wanted}


class _Quotient:
    operands = _Sum.operands

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        gradient = gradient / operands["right"]
        by = {"left": gradient, "right": -gradient * operands["left"] / operands["right"]}
        return {(role,): _rows(operands[role], by[role], split) for role in wanted}


class _Expand:
    """A parameter repeated for every example, such as a class token."""

    parts = _Sum.parts

    def operands(self, input: Tensor, *sizes: Any, **kwargs: Any) -> Operands | None:
        return None if kwargs else Operands({"left": input}, input, 3)


def _rows(parameter: Tensor, gradient: Tensor, split: Split) -> DenseRows:
    return DenseRows((sum_broadcast(gradient, tuple(parameter.shape), split),))


ELEMENTWISE: dict[Callable[..., object], LayerRule] = {
    **dict.fromkeys(_SUMS, _Sum()),
    **dict.fromkeys(_DIFFERENCES, _Difference()),
    **dict.fromkeys(_QUOTIENTS, _Quotient()),
    **dict.fromkeys(_PRODUCTS, _Product()),
    torch.Tensor.expand: _Expand(),
}
