"""SGD with momentum, Nesterov momentum, dampening and weight decay, as in ``torch.optim.SGD``."""

import torch
from torch import Tensor

from lightning_influence.numerics.optimizers.rule import OptimizerState, UpdateInput, UpdateRule

_BUFFER = "momentum_buffer"


class SGD(UpdateRule):
    """SGD as in ``torch.optim`` (momentum: Sutskever et al., 2013), with the derivatives of HyDRA (Chen et al., 2021).

    A parameter's first step copies the gradient into the momentum buffer: dampening applies from the second step on.
    """

    uniform = True

    def step(self, at: UpdateInput) -> tuple[Tensor, OptimizerState]:
        """The weight and the state after the step."""
        options = at.options
        gradient = -at.gradient if options.get("maximize") else at.gradient
        if options["weight_decay"]:
            gradient = gradient.add(at.weight, alpha=options["weight_decay"])
        state: OptimizerState = {}
        if momentum := options["momentum"]:
            buffer = _buffer(at, gradient, at.state.get(_BUFFER))
            gradient = gradient.add(buffer, alpha=momentum) if options["nesterov"] else buffer
            state = {_BUFFER: buffer}
        return at.weight.add(gradient, alpha=-options["lr"]), state

    def tangent(
        self, at: UpdateInput, weight: Tensor, gradient: Tensor, state: OptimizerState
    ) -> tuple[Tensor, OptimizerState]:
        """The step itself applied to the changes, since it is linear in weight, gradient and state."""
        options = at.options
        change = -gradient if options.get("maximize") else gradient
        if options["weight_decay"]:
            change = change + options["weight_decay"] * weight
        after: OptimizerState = {}
        if momentum := options["momentum"]:
            buffer = _buffer(at, change, state.get(_BUFFER))
            change = change + momentum * buffer if options["nesterov"] else buffer
            after = {_BUFFER: buffer}
        return weight - options["lr"] * change, after

    def adjoint(self, at: UpdateInput, weight: Tensor, state: OptimizerState) -> tuple[Tensor, Tensor, OptimizerState]:
        """The transpose of ``tangent``."""
        options = at.options
        change = -options["lr"] * weight
        before: OptimizerState = {}
        if momentum := options["momentum"]:
            nesterov = options["nesterov"]
            buffer = momentum * change if nesterov else change
            if _BUFFER in state:
                buffer = buffer + state[_BUFFER]
            if _BUFFER in at.state:
                before = {_BUFFER: momentum * buffer}
                into = buffer * (1.0 - options["dampening"])
            else:
                into = buffer
            change = into + change if nesterov else into
        if options["weight_decay"]:
            weight = weight + options["weight_decay"] * change
        return (-change if options.get("maximize") else change), weight, before


def _buffer(at: UpdateInput, gradient: Tensor, buffer: Tensor | None) -> Tensor:
    if _BUFFER not in at.state:
        return gradient
    kept = torch.zeros_like(gradient) if buffer is None else buffer * at.options["momentum"]
    return kept.add(gradient, alpha=1.0 - at.options["dampening"])
