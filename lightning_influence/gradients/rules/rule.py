"""The interface of layer rules: each reads the operands of a call and turns the output gradient into parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lightning_influence.gradients.layout import Layout
from lightning_influence.gradients.part import Part


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
        """Read the arguments of a call; give this method the signature of the torch function.

        Returns:
            The operands, or None if the rule does not cover this call.
        """

    def parts(
        self, operands: Operands, gradient: Tensor, wanted: frozenset[str], examples: int, layout: Layout
    ) -> dict[tuple[str, ...], Part]:
        """Per-sample gradients of the parameters of one call.

        Args:
            operands: the result of ``operands``, with parameters and input detached.
            gradient: the gradient of the summed per-sample losses with respect to the call's output, in its shape.
            wanted: the roles of the trainable parameters.
            examples: how many examples the batch has.
            layout: which dimension of the activations holds the examples; ``layout.split`` brings it to the front.

        Returns:
            Parts by the roles that they are for; ``("weight", "bias")`` may share one.

        Raises:
            LayoutMismatch: the activations do not have this layout.
        """
