"""Records every operation that uses a trainable parameter, and the gradient that comes back to its output."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_influence.gradients.rules import RULES, Operands, Rule


@dataclass(eq=False)
class Call:
    """One operation of a forward pass.

    Args:
        rule: how its parameters' gradients are read off.
        operands: its operands.
        names: the trainable parameters in it by role.
        occurrence: how many calls in this pass used the first of these parameters before.
        shape: the output's shape.
        gradient: the gradient that arrived, or None when the loss does not depend on the output.
    """

    rule: Rule
    operands: Operands
    names: Mapping[str, str]
    occurrence: int
    shape: tuple[int, ...]
    gradient: Tensor | None = field(default=None)

    @property
    def site(self) -> tuple[str, int]:
        """What this call is in every pass: its parameter and its place among that parameter's calls."""
        return next(iter(self.names.values())), self.occurrence

    def receive(self, gradient: Tensor) -> None:
        """Called by autograd."""
        self.gradient = gradient.detach() if self.gradient is None else self.gradient + gradient.detach()


class Tape(TorchFunctionMode):
    """While active, notes each call whose operand *is* a trainable parameter.

    It watches functions, not modules, so that reused and tied modules, ``nn.MultiheadAttention`` and functional uses
    of a weight are seen alike. The parameters need no gradient of their own meanwhile: no weight gradient is formed.

    Args:
        names: parameter names by ``id`` of the parameter.
        copy_leaves: hand out copies of the first outputs, for models that write into them in place.
    """

    def __init__(self, names: Mapping[int, str], copy_leaves: bool = False) -> None:
        super().__init__()
        self.names = names
        self.copy_leaves = copy_leaves
        self.calls: list[Call] = []
        self.outputs: list[Tensor] = []
        self._occurrences: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs ``func``; what it returns is what it would have returned, but for requiring a gradient."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        rule = RULES.get(func)
        if rule is None or not torch.is_grad_enabled() or not self._has_parameter(args, kwargs):
            return func(*args, **kwargs)
        return self._record(rule, func, args, kwargs)

    def _has_parameter(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        return any(id(a) in self.names for a in args) or any(id(a) in self.names for a in kwargs.values())

    def _record(self, rule: Rule, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            operands = rule.operands(*args, **kwargs)
        except TypeError:  # a signature of another torch version: the self-check sends the parameter the general way
            operands = None
        output = func(*args, **kwargs)
        if operands is None or not isinstance(output, Tensor):
            return output
        names = {role: self.names[id(p)] for role, p in operands.parameters.items() if id(p) in self.names}
        if not names:
            return output
        if not output.requires_grad:
            output.requires_grad_()
            if self.copy_leaves:
                output = output.clone()
        first = next(iter(names.values()))
        occurrence = self._occurrences.get(first, 0)
        self._occurrences[first] = occurrence + 1
        call = Call(rule, _detached(operands), names, occurrence, tuple(output.shape))
        # A hook, not the tensor: where the model changes the output in place afterwards, the tensor stands for the new
        # value and the hook still for the old one.
        output.register_hook(call.receive)
        self.calls.append(call)
        self.outputs.append(output)
        return output

    def _attention(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """``nn.MultiheadAttention`` hands its weights to one big function, whose products are seen by standing in."""
        original = F.linear
        rule = RULES[original]

        def linear(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or not self._has_parameter(args, kwargs):
                return original(*args, **kwargs)
            return self._record(rule, original, args, kwargs)

        F.linear = linear
        try:
            return func(*args, **kwargs)
        finally:
            F.linear = original


def _detached(operands: Operands) -> Operands:
    parameters = {role: None if p is None else p.detach() for role, p in operands.parameters.items()}
    return Operands(parameters, operands.input.detach(), operands.positions, operands.options)
