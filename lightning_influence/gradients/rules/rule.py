"""The interface of layer rules: each reads the operands of a call and turns the output gradient into parts."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from torch import Tensor

from lightning_influence.gradients.layout import Split
from lightning_influence.gradients.part import Part

Parts = dict[tuple[str, ...], Part]
"""Parts by the roles of the parameters that they are for; ``("weight", "bias")`` may share one."""


@dataclass(frozen=True)
class Operands:
    """The operands of one call of a torch function.

    Args:
        parameters: operands that may be trainable parameters by role, such as ``{"weight": weight, "bias": bias}``.
        input: the tensor that the parameters are applied to; any operand if the rule does not need it.
        positions: how many leading dimensions of the output are examples and positions, not features.
        options: anything else that ``LayerRule.parts`` needs.
    """

    parameters: Mapping[str, Tensor | None]
    input: Tensor
    positions: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, role: str) -> Tensor:
        """The operand with this role.

        Raises:
            KeyError: there is none.
        """
        operand = self.parameters[role]
        if operand is None:
            raise KeyError(role)
        return operand


class LayerRule(Protocol):
    """How to compute the per-sample gradients of the parameters of one torch function.

    ``RULES`` maps functions to rules. The self-check compares every rule with plain autograd on the user's model, and a
    parameter for which it is wrong takes the general path (``torch.func``, or one backward pass per example).
    """

    def operands(self, *args: Any, **kwargs: Any) -> Operands | None:
        """Read the arguments of a call; this method has the signature of the torch function, or binds ``arguments``.

        Returns:
            The operands, or None if the rule does not cover this call.
        """

    def parts(self, operands: Operands, gradient: Tensor, wanted: frozenset[str], split: Split) -> Parts:
        """Per-sample gradients of the parameters of one call.

        Args:
            operands: the result of ``operands``, with parameters and input detached.
            gradient: the gradient of the summed per-sample losses with respect to the call's output, in its shape.
            wanted: the roles of the trainable parameters.
            split: brings the examples of the batch to the front of its activations.

        Raises:
            LayoutMismatch: the activations do not have the layout of ``split``.
        """


_signature = cache(inspect.signature)


def arguments(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included; for torch functions that are written in Python.

    Raises:
        TypeError: they do not fit the function's signature.
    """
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
