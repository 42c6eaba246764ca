"""Rules for convolutions and transposed convolutions in one to three dimensions, as matrix products over patches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.layout import Split
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.rules.rule import LayerRule, Operands, Parts


@dataclass(frozen=True)
class Patches:
    """Unfolds maps [example, position, channel, *space] into the windows that a convolution kernel is applied to.

    Args:
        kernel: size of the window in each spatial dimension.
        stride: distance between neighbouring windows.
        padding: zeros (before, after) each spatial dimension.
        dilation: distance between neighbouring pixels of one window.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def __call__(self, maps: Tensor) -> Tensor:
        """Map to [example, window, channel x kernel]."""
        examples, space = maps.shape[0], maps.shape[3:]
        flat = maps.flatten(0, 1)
        if any(before or after for before, after in self.padding):
            flat = F.pad(flat, [size for pair in reversed(self.padding) for size in pair])
        windows = flat
        for axis in range(len(space)):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            windows = windows.unfold(2 + axis, reach, self.stride[axis])[..., :: self.dilation[axis]]
        # [example x position, channel, *window, *kernel]: one copy brings it to [.., channel x kernel, window], which
        # a matrix product reads transposed without another.
        d = len(space)
        order = (0, 1, *range(2 + d, 2 + 2 * d), *range(2, 2 + d))
        width = maps.shape[2] * math.prod(self.kernel)
        columns = windows.permute(order).reshape(len(flat), width, -1)
        if maps.shape[1] == 1:
            return columns.transpose(1, 2)
        return columns.view(examples, -1, *columns.shape[1:]).transpose(2, 3).reshape(examples, -1, width)


def _per_dimension(value: Any, dimensions: int) -> tuple[int, ...]:
    sizes = (value,) * dimensions if isinstance(value, int) else tuple(int(v) for v in value)
    return sizes * dimensions if len(sizes) == 1 else sizes


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((size, size) for size in _per_dimension(value, len(kernel)))


def _patches(weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, **_: Any) -> Patches:
    """The windows of a convolution; for a transposed one, those of the convolution that it is the adjoint of."""
    kernel = tuple(weight.shape[2:])
    dilation = _per_dimension(dilation, len(kernel))
    return Patches(kernel, _per_dimension(stride, len(kernel)), _padding(padding, kernel, dilation), dilation)


def _positions_last(maps: Tensor) -> Tensor:
    """Rearrange [example, position, channel, *space] to [example, position x space, channel]."""
    return maps.flatten(3).transpose(2, 3).flatten(1, 2)


def _grouped_rows(left: Tensor, right: Tensor, groups: int, shape: tuple[int, ...]) -> Tensor:
    """The sum over positions of outer products within each group of channels, [example, *shape]."""
    examples, positions = left.shape[:2]
    left = left.reshape(examples, positions, groups, -1).permute(0, 2, 3, 1).flatten(0, 1)
    right = right.reshape(examples, positions, groups, -1).transpose(1, 2).flatten(0, 1)
    return torch.bmm(left, right).reshape(examples, *shape)


class _Convolution:
    order: tuple[str, ...] = ("stride", "padding", "dilation", "groups")

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def operands(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Operands | None:
        if input.ndim != self.dimensions + 2:
            return None
        given = dict(zip(self.order, args, strict=False)) | kwargs
        options = {"patches": _patches(weight, **given), "groups": given.get("groups", 1)}
        return Operands({"weight": weight, "bias": bias}, input, 1, options)

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        outputs = _positions_last(split(gradient))
        if "weight" not in wanted:
            return {("bias",): DenseRows((outputs.sum(1),))}
        shape, groups = tuple(operands["weight"].shape), operands.options["groups"]
        patches = operands.options["patches"]
        maps, bias = split(operands.input), "bias" in wanted
        if groups == 1:
            part: Part = OuterProducts(maps, outputs, shape, bias, patches=patches)
        else:
            rows = _grouped_rows(outputs, patches(maps), groups, shape)
            part = DenseRows((rows, outputs.sum(1)) if bias else (rows,))
        return {("weight", "bias") if bias else ("weight",): part}


class _TransposedConvolution(_Convolution):
    """The adjoint of a convolution: its patches are taken from the output gradient."""

    order = ("stride", "padding", "output_padding", "groups", "dilation")

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        maps = split(gradient)
        parts: Parts = {}
        if "bias" in wanted:
            parts["bias",] = DenseRows((maps.flatten(3).sum((1, 3)),))
        if "weight" in wanted:
            shape, groups = tuple(operands["weight"].shape), operands.options["groups"]
            inputs = _positions_last(split(operands.input))
            windows = operands.options["patches"](maps)[:, : inputs.shape[1]]
            if groups == 1:
                parts["weight",] = OuterProducts(windows, inputs, shape)
            else:
                parts["weight",] = DenseRows((_grouped_rows(inputs, windows, groups, shape),))
        return parts


CONVOLUTIONS: dict[Callable[..., object], LayerRule] = {
    F.conv1d: _Convolution(1),
    F.conv2d: _Convolution(2),
    F.conv3d: _Convolution(3),
    F.conv_transpose1d: _TransposedConvolution(1),
    F.conv_transpose2d: _TransposedConvolution(2),
    F.conv_transpose3d: _TransposedConvolution(3),
}
