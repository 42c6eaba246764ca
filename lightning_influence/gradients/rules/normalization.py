"""Rules for the affine parameters of normalisation layers, whose gradients are small and therefore dense."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.layout import Split
from lightning_influence.gradients.rules.rule import LayerRule, Operands, Parts, arguments


class _Normalization:
    """A normalisation function, called once more without weight and bias for the normalised inputs."""

    def __init__(self, func: Callable[..., Tensor]) -> None:
        self.func = func

    def operands(self, *args: Any, **kwargs: Any) -> Operands | None:
        given = arguments(self.func, args, kwargs)
        input, features = given.pop("input"), len(given.get("normalized_shape", ()))
        parameters = {role: given.pop(role, None) for role in ("weight", "bias")}
        options = {"features": features, "normalize": partial(self.func, **given)}
        return Operands(parameters, input, input.ndim - features if features else 1, options)

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        """Sum over positions the output gradients × normalised inputs (weight) and the output gradients (bias).

        ``options["features"]`` is the number of trailing dimensions that the parameters span, or 0 for one channel
        dimension after the examples.
        """
        features = operands.options["features"]

        def summed(tensor: Tensor) -> Tensor:
            if features:
                return split.positions(tensor, features).sum(1)
            tensor = split(tensor)
            return tensor.flatten(3).sum((1, 3)) if tensor.ndim > 3 else tensor.sum(1)

        parts: Parts = {}
        if "weight" in wanted:
            parts["weight",] = DenseRows((summed(gradient * operands.options["normalize"](operands.input)),))
        if "bias" in wanted:
            parts["bias",] = DenseRows((summed(gradient),))
        return parts


class _BatchNorm(_Normalization):
    """Batch normalisation by running statistics only: batch statistics mix the examples."""

    def operands(self, *args: Any, **kwargs: Any) -> Operands | None:
        given = arguments(self.func, args, kwargs)
        statistics = {name: given[name] for name in ("running_mean", "running_var")}
        if given["training"] or any(statistic is None for statistic in statistics.values()):
            return None
        kept = {n: s.to(torch.promote_types(s.dtype, torch.float32), copy=True) for n, s in statistics.items()}
        return super().operands(**given | kept)


class _InstanceNorm(_Normalization):
    """Instance normalisation by the statistics of the input only; a second call must not update the running ones."""

    def operands(self, *args: Any, **kwargs: Any) -> Operands | None:
        given = arguments(self.func, args, kwargs) | {"running_mean": None, "running_var": None}
        return super().operands(**given) if given["use_input_stats"] else None


NORMALIZATIONS: dict[Callable[..., object], LayerRule] = {
    F.layer_norm: _Normalization(F.layer_norm),
    F.rms_norm: _Normalization(F.rms_norm),
    F.group_norm: _Normalization(F.group_norm),
    F.batch_norm: _BatchNorm(F.batch_norm),
    F.instance_norm: _InstanceNorm(F.instance_norm),
}
