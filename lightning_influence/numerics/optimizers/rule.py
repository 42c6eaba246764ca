"""What an optimizer's rule is: one parameter's step, and how a small change passes through it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

OptimizerState = dict[str, Tensor]
"""The optimizer's tensors of one parameter by torch's own names, without the counter ``step``."""


@dataclass(frozen=True)
class UpdateInput:
    """One parameter about to be moved.

    Args:
        weight: [*shape].
        gradient: [*shape], accumulated and clipped, as the optimizer finds it in ``.grad``.
        state: empty before the parameter's first step.
        count: steps that this parameter has made before.
        options: the settings of its parameter group as torch names them, ``lr`` among them.
    """

    weight: Tensor
    gradient: Tensor
    state: OptimizerState
    count: int
    options: Mapping[str, Any]


class UpdateRule(ABC):
    """How an optimizer of one kind moves one parameter.

    Whoever adds a rule writes ``step`` in tensor operations without branches on values, and ``check``; ``tangent`` and
    ``adjoint`` then follow by automatic differentiation. See ``add_rule``.
    """

    uniform: ClassVar[bool] = False
    """Whether the derivatives are the same numbers for every entry of a parameter, whatever its weights and gradients
    are: ``tangent`` and ``adjoint`` then take tensors of any shape, and one number can stand for a whole gradient."""

    @abstractmethod
    def step(self, at: UpdateInput) -> tuple[Tensor, OptimizerState]:
        """The weight and the state after the step."""

    def check(self, options: Mapping[str, Any]) -> None:  # noqa: B027 - an optimizer may have nothing to refuse
        """Raises ValueError where these settings of a parameter group are beyond the rule."""

    def tangent(
        self, at: UpdateInput, weight: Tensor, gradient: Tensor, state: OptimizerState
    ) -> tuple[Tensor, OptimizerState]:
        """How changes of weight, gradient and state pass to the weight and the state after the step.

        Args:
            at: where.
            weight: [k, *shape], k directions at once.
            gradient: [k, *shape].
            state: [k, *shape] by name; what is missing is zero.
        """
        inner = {name: state[name] if name in state else torch.zeros_like(weight) for name in at.state}

        def push(*change: Any) -> Any:
            return torch.func.jvp(self._function(at), (at.weight, at.gradient, at.state), change)[1]

        return torch.func.vmap(push)(weight, gradient, inner)  # type: ignore[no-any-return]

    def adjoint(self, at: UpdateInput, weight: Tensor, state: OptimizerState) -> tuple[Tensor, Tensor, OptimizerState]:
        """The transpose: derivatives by the weight and state after the step become those by gradient, weight, state.

        Args:
            at: where.
            weight: [k, *shape], k quantities at once.
            state: [k, *shape] by name; what is missing is zero.

        Returns:
            [k, *shape] each: by the gradient, by the weight (not counting that the gradient depends on it), by the
            state.
        """
        after, pull = torch.func.vjp(self._function(at), at.weight, at.gradient, at.state)[:2]
        outer = {name: state[name] if name in state else torch.zeros_like(weight) for name in after[1]}
        by_weight, by_gradient, by_state = torch.func.vmap(pull)((weight, outer))
        return by_gradient, by_weight, by_state

    def _function(self, at: UpdateInput) -> Any:
        return lambda weight, gradient, state: self.step(UpdateInput(weight, gradient, state, at.count, at.options))
