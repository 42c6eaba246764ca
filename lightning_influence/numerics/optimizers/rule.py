"""Optimizer rules: the update of one parameter in one step, and its derivatives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

OptimizerState = dict[str, Tensor]
"""The optimizer's state tensors of one parameter by torch's names, without the counter ``step``."""


@dataclass(frozen=True)
class UpdateInput:
    """One parameter before an update.

    Args:
        weight: [*shape].
        gradient: [*shape], accumulated and clipped, as the optimizer finds it in ``.grad``.
        state: the optimizer's state; before the parameter's first step, empty or what the optimizer was made with, as
            the sums of ``torch.optim.Adagrad``: read it with ``state.get``.
        count: the number of earlier steps of this parameter.
        options: the options of its parameter group by torch's names, such as ``lr``.
    """

    weight: Tensor
    gradient: Tensor
    state: OptimizerState
    count: int
    options: Mapping[str, Any]


class UpdateRule(ABC):
    """How an optimizer updates one parameter.

    To add an optimizer, write ``step`` in tensor operations without branches on their values, and ``check`` if some
    options are not covered; ``tangent`` and ``adjoint`` follow by automatic differentiation. See ``add_rule``.

    Where a gradient was always 0, as behind a dead ReLU, a ``sqrt`` at 0 makes the derivatives NaN, and ``HyDRA``
    reports queries without finite gradients. Mask it on both sides::

        zero = square == 0
        root = square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
    """

    uniform: ClassVar[bool] = False
    """Whether the derivatives are the same for every entry of a parameter and do not depend on weights and gradients
    (as for SGD): ``tangent`` and ``adjoint`` then accept tensors of any shape, also one number per gradient."""

    @abstractmethod
    def step(self, at: UpdateInput) -> tuple[Tensor, OptimizerState]:
        """The weight and the state after the step."""

    def check(self, options: Mapping[str, Any]) -> None:  # noqa: B027 - an optimizer may have nothing to refuse
        """Raise ValueError if the rule does not cover these options of a parameter group."""

    def tangent(
        self, at: UpdateInput, weight: Tensor, gradient: Tensor, state: OptimizerState
    ) -> tuple[Tensor, OptimizerState]:
        """The Jacobian-vector product of the step: changes of the updated weight and state.

        Args:
            at: the parameter before the step.
            weight: changes of the weight, [k, *shape] for k directions at once.
            gradient: changes of the gradient, [k, *shape].
            state: changes of the state, [k, *shape] by name; a missing name is zero.

        Returns:
            The changes of the weight and of the state after the step, [k, *shape] each.
        """
        inner = {name: state[name] if name in state else torch.zeros_like(weight) for name in at.state}

        def jvp(*change: Any) -> Any:
            return torch.func.jvp(self._function(at), (at.weight, at.gradient, at.state), change)[1]

        return torch.func.vmap(jvp)(weight, gradient, inner)  # type: ignore[no-any-return]

    def adjoint(self, at: UpdateInput, weight: Tensor, state: OptimizerState) -> tuple[Tensor, Tensor, OptimizerState]:
        """The vector-Jacobian product of the step, the transpose of ``tangent``.

        Args:
            at: the parameter before the step.
            weight: derivatives with respect to the weight after the step, [k, *shape] for k quantities at once.
            state: derivatives with respect to the state after the step, [k, *shape] by name; a missing name is zero.

        Returns:
            Derivatives with respect to the gradient, the weight (for a fixed gradient) and the state before the step,
            [k, *shape] each.
        """
        after, vjp = torch.func.vjp(self._function(at), at.weight, at.gradient, at.state)[:2]
        outer = {name: state[name] if name in state else torch.zeros_like(weight) for name in after[1]}
        by_weight, by_gradient, by_state = torch.func.vmap(vjp)((weight, outer))
        return by_gradient, by_weight, by_state

    def _function(self, at: UpdateInput) -> Any:
        return lambda weight, gradient, state: self.step(UpdateInput(weight, gradient, state, at.count, at.options))
