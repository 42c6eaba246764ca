"""Adam and AdamW with bias correction, as ``torch.optim`` does them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.numerics.optimizers.rule import OptimizerState, UpdateInput, UpdateRule

_MEAN, _SQUARE = "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class Adam(UpdateRule):
    """Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019), as ``torch.optim`` implements them.

    Args:
        decoupled: whether the weight decay bypasses the moments (AdamW), for torch versions whose parameter groups
            have no option ``decoupled_weight_decay``.
    """

    decoupled: bool = False

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError for ``amsgrad=True``."""
        if options.get("amsgrad"):
            raise ValueError(
                "Expected Adam or AdamW with `amsgrad=False`, got `amsgrad=True`, whose running maximum the rule does "
                "not cover. Fit with `amsgrad=False`, or use `TracInCP()`, which works with any optimizer."
            )

    def step(self, at: UpdateInput) -> tuple[Tensor, OptimizerState]:
        """The weight and the state after the step."""
        options = at.options
        weight, decay = at.weight, options["weight_decay"]
        if decay and self._decoupled(options):
            weight = weight * (1.0 - options["lr"] * decay)
        _, (mean, square) = self._moments(at)
        first, second = _corrections(at)
        denominator = (square.sqrt() / math.sqrt(second)).add(options["eps"])
        return weight.addcdiv(mean, denominator, value=-options["lr"] / first), {_MEAN: mean, _SQUARE: square}

    def tangent(
        self, at: UpdateInput, weight: Tensor, gradient: Tensor, state: OptimizerState
    ) -> tuple[Tensor, OptimizerState]:
        """The changes of the two moments, and of the weight through them."""
        options, (one, two) = at.options, at.options["betas"]
        own, (mean, square) = self._moments(at)
        decay = options["weight_decay"]
        change = -gradient if options.get("maximize") else gradient
        if decay and not self._decoupled(options):
            change = change + decay * weight
        d_mean, d_square = (1.0 - one) * change, 2.0 * (1.0 - two) * own * change
        if _MEAN in state:
            d_mean, d_square = d_mean + one * state[_MEAN], d_square + two * state[_SQUARE]
        by_mean, by_square = _slopes(at, mean, square)
        if decay and self._decoupled(options):
            weight = (1.0 - options["lr"] * decay) * weight
        return weight + by_mean * d_mean + by_square * d_square, {_MEAN: d_mean, _SQUARE: d_square}

    def adjoint(self, at: UpdateInput, weight: Tensor, state: OptimizerState) -> tuple[Tensor, Tensor, OptimizerState]:
        """The transpose of ``tangent``."""
        options, (one, two) = at.options, at.options["betas"]
        own, (mean, square) = self._moments(at)
        decay = options["weight_decay"]
        by_mean, by_square = _slopes(at, mean, square)
        d_mean, d_square = by_mean * weight, by_square * weight
        if _MEAN in state:
            d_mean, d_square = d_mean + state[_MEAN], d_square + state[_SQUARE]
        change = (1.0 - one) * d_mean + 2.0 * (1.0 - two) * own * d_square
        if decay:
            weight = weight * (1.0 - options["lr"] * decay) if self._decoupled(options) else weight + decay * change
        before = {_MEAN: one * d_mean, _SQUARE: two * d_square} if at.state else {}
        return (-change if options.get("maximize") else change), weight, before

    def _decoupled(self, options: Mapping[str, Any]) -> bool:
        return bool(options.get("decoupled_weight_decay", self.decoupled))

    def _moments(self, at: UpdateInput) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The gradient that enters the moments (with L2 weight decay), and the updated moments."""
        options, (one, two) = at.options, at.options["betas"]
        gradient = -at.gradient if options.get("maximize") else at.gradient
        if options["weight_decay"] and not self._decoupled(options):
            gradient = gradient.add(at.weight, alpha=options["weight_decay"])
        mean = at.state[_MEAN] if at.state else torch.zeros_like(gradient)
        square = at.state[_SQUARE] if at.state else torch.zeros_like(gradient)
        return gradient, (mean.lerp(gradient, 1.0 - one), (square * two).addcmul(gradient, gradient, value=1.0 - two))


def _corrections(at: UpdateInput) -> tuple[float, float]:
    one, two = at.options["betas"]
    return 1.0 - one ** (at.count + 1), 1.0 - two ** (at.count + 1)


def _slopes(at: UpdateInput, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the updated weight with respect to the two updated moments.

    Where the second moment is zero, all gradients were zero, and the derivative with respect to it is taken as 0, its
    one-sided limit.
    """
    first, second = _corrections(at)
    root = (square / second).sqrt()
    denominator = root + at.options["eps"]
    size = at.options["lr"] / first
    by_square = size * mean / denominator.square() / (2.0 * second * root)
    return -size / denominator, torch.where(square > 0, by_square, torch.zeros_like(by_square))
