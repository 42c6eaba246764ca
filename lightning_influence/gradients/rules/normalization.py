"""Rules for the affine parameters of normalisation layers, whose gradients are small and therefore dense."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.layout import Layout, split
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.rules.rule import LayerRule, Operands


def _affine(
    operands: Operands, gradient: Tensor, wanted: frozenset[str], examples: int, layout: Layout
) -> dict[tuple[str, ...], Part]:
    """Sum over positions the output gradients × normalised inputs (weight) and the output gradients (bias).

    ``options["features"]`` is the number of trailing dimensions that the parameters span, or 0 for one channel
    dimension after the examples.
    """
    features = operands.options["features"]

    def summed(tensor: Tensor) -> Tensor:
        tensor = split(tensor, examples, layout)
        if features:
            return tensor.reshape(examples, -1, *tensor.shape[tensor.ndim - features :]).sum(1)
        return tensor.flatten(3).sum((1, 3)) if tensor.ndim > 3 else tensor.sum(1)

    parts: dict[tuple[str, ...], Part] = {}
    if "weight" in wanted:
        parts["weight",] = DenseRows((summed(gradient * operands.options["normalize"](operands.input)),))
    if "bias" in wanted:
        parts["bias",] = DenseRows((summed(gradient),))
    return parts


class _LayerNorm:
    parts = staticmethod(_affine)

    def operands(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Operands | None:
        shape = list(normalized_shape)
        options = {"features": len(shape), "normalize": lambda x: F.layer_norm(x, shape, eps=eps)}
        return Operands({"weight": weight, "bias": bias}, input, input.ndim - len(shape), options)


class _RMSNorm:
    parts = staticmethod(_affine)

    def operands(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Operands | None:
        shape = list(normalized_shape)
        options = {"features": len(shape), "normalize": lambda x: F.rms_norm(x, shape, eps=eps)}
        return Operands({"weight": weight}, input, input.ndim - len(shape), options)


class _GroupNorm:
    parts = staticmethod(_affine)

    def operands(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Operands | None:
        options = {"features": 0, "normalize": lambda x: F.group_norm(x, num_groups, eps=eps)}
        return Operands({"weight": weight, "bias": bias}, input, 1, options)


class _BatchNorm:
    """Batch normalisation by running statistics only: batch statistics mix the examples."""

    parts = staticmethod(_affine)

    def operands(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Operands | None:
        if training or running_mean is None or running_var is None:
            return None
        mean, variance = running_mean.clone(), running_var.clone()
        options: dict[str, Any] = {"features": 0, "normalize": lambda x: F.batch_norm(x, mean, variance, eps=eps)}
        return Operands({"weight": weight, "bias": bias}, input, 1, options)


class _InstanceNorm:
    parts = staticmethod(_affine)

    def operands(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Operands | None:
        if not use_input_stats:
            return None
        options = {"features": 0, "normalize": lambda x: F.instance_norm(x, eps=eps)}
        return Operands({"weight": weight, "bias": bias}, input, 1, options)


NORMALIZATIONS: dict[Callable[..., object], LayerRule] = {
    F.layer_norm: _LayerNorm(),
    F.rms_norm: _RMSNorm(),
    F.group_norm: _GroupNorm(),
    F.batch_norm: _BatchNorm(),
    F.instance_norm: _InstanceNorm(),
}
