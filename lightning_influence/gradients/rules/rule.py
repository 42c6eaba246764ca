"""What a rule is: it reads the operands of a call, and turns its output gradient into parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lightning_influence.gradients.layout import Layout
from lightning_influence.gradients.part import Part


@dataclass(frozen=True)
class Operands:
    """The operands of one call, named by the part they play.

    Args:
        parameters: candidates for trainable parameters by role, for example ``{"weight": ..., "bias": ...}``.
        input: what the parameters are applied to (where only the output matters, any operand).
        options: whatever else the rule needs.
        positions: number of leading dimensions of the output that count positions rather than features.
    """

    parameters: Mapping[str, Tensor | None]
    input: Tensor
    positions: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, role: str) -> Tensor:
        """The operand that plays ``role``."""
        operand = self.parameters[role]
        if operand is None:
            raise KeyError(role)
        return operand


class LayerRule(Protocol):
    """One kind of operation."""

    def operands(self, *args: Any, **kwargs: Any) -> Operands | None:
        """Reads a call with the operation's own signature; None where the rule does not cover the call."""

    def parts(
        self, operands: Operands, gradient: Tensor, wanted: frozenset[str], examples: int, layout: Layout
    ) -> dict[tuple[str, ...], Part]:
        """Per-sample gradients of the ``wanted`` roles, given the gradient by the call's output.

        Roles that can share one part (weight and bias) come under one key.
        """
