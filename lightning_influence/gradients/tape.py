"""Records every operation that uses a trainable parameter, and the gradient with respect to its output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_influence.gradients.rules import RULES, LayerRule, Operands
from lightning_influence.gradients.rules.elementwise import SUMS
from lightning_influence.gradients.rules.recurrent import RECURRENT, unrolled
from lightning_influence.gradients.rules.shared import SHARED_SUM, Shared, shared_tensor
from lightning_influence.gradients.spot_checks import CONDITIONS, SuspectRows
from lightning_influence.module.precision import is_half
from lightning_influence.module.snapshot import restoring
from lightning_influence.module.transforms import in_transform

_LINEAR = F.linear
_CASTS = frozenset({Tensor.to, Tensor.bfloat16, Tensor.half})

T = TypeVar("T", Tensor, Tensor | None)
Use = tuple[str, Any]
"""A parameter's name and a function that it is passed to."""


@dataclass(eq=False)
class Call:
    """One operation of a forward pass with trainable parameters.

    Args:
        rule: computes the per-sample gradients of its parameters.
        operands: its operands.
        names: its trainable parameters by role, such as ``{"weight": "net.0.weight"}``.
        shape: the shape of its output.
        gradient: the gradient with respect to its output; None if the loss does not depend on it.
    """

    rule: LayerRule
    operands: Operands
    names: Mapping[str, str]
    shape: tuple[int, ...]
    gradient: Tensor | None = field(default=None)

    def in_float32(self) -> "Call":
        """The same with what the layer saw in 16 bits in float32, in which the products of its factors are summed."""
        gradient, input = self.gradient, self.operands.input
        if gradient is None or not (is_half(gradient) or is_half(input)):
            return self
        if is_half(gradient) and input.dtype is torch.float32:  # the layer saw autocast's copy of it
            input = input.to(gradient.dtype)
        parameters = {role: _raised(p) for role, p in self.operands.parameters.items()}
        operands = replace(self.operands, parameters=parameters, input=_raised(input))
        return replace(self, operands=operands, gradient=_raised(gradient))


class Tape(TorchFunctionMode):
    """While active, records each call of a torch function with a trainable parameter among its operands.

    It intercepts functions, not modules, so that reused and tied modules, ``nn.MultiheadAttention`` and functional
    uses of a weight are all covered. The parameters do not require gradients meanwhile, so that no weight gradients
    are computed.

    Args:
        names: parameter names by ``id`` of the parameter.
        copy_leaves: return copies of the outputs that become leaves, for models that write into them in place.
        watch: called with every function call; None: nobody watches.
    """

    def __init__(self, names: Mapping[int, str], copy_leaves: bool = False, watch: SuspectRows | None = None) -> None:
        super().__init__()
        self.names = dict(names)
        self.copy_leaves = copy_leaves
        self.watch = watch
        self.calls: list[Call] = []
        self.total: Tensor | None = None
        self.uses: set[Use] = set()
        self.edges: list[Any] = []
        self._shared: dict[int, Shared] = {}
        self._casts: list[Tensor] = []  # kept, so that no other tensor has the id of one

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run and record ``func``; its result is unchanged, except that it may require a gradient."""
        kwargs = kwargs or {}
        if self.watch is not None:
            self.watch(func, args, kwargs)
        operands = list(_operands(args, kwargs))
        shared = [self._shared[id(a)] for a in operands if id(a) in self._shared]
        used = [self.names[id(a)] for a in operands if id(a) in self.names] + [s.name for s in shared]
        if not used or not torch.is_grad_enabled() or getattr(func, "__name__", "") == "__get__":
            result = func(*args, **kwargs)
            if func in CONDITIONS and self.watch is not None and isinstance(result, bool):
                self.watch.outcomes.append(result)
            return result
        if func in _CASTS and id(args[0]) in self.names and is_half(output := func(*args, **kwargs)):
            self.names[id(output)] = used[0]  # it stands for the parameter
            self._casts.append(output)
            return output
        self.uses.update((name, func) for name in used)
        if in_transform():  # the self-check sends these parameters to the general path
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        if func in RECURRENT and not kwargs:
            output = unrolled(self._linear, func, args)
            return func(*args) if output is None else output
        if shared and func in SUMS and not kwargs:
            return self._sum(func, args, shared)
        return self._run(func, args, kwargs)

    def _run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        rule = RULES.get(func)
        output = func(*args, **kwargs) if rule is None else self._record(rule, func, args, kwargs)
        made = shared_tensor(func, args, kwargs, output, self._shared, self.names)
        if made is not None:
            self._shared[id(output)] = made
        return output

    def _sum(self, func: Callable[..., Any], args: Sequence[Any], shared: Sequence[Shared]) -> Any:
        """Record a sum with a tensor that the batch shares: only the sum's output has one gradient per example."""
        shape = torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, Tensor)))
        shared = [s for s in shared if s.is_shared_in(shape)]
        own = {id(s.value): s.value.detach() for s in shared}
        output = self._run(func, [own.get(id(a), a) for a in args], {})
        for s in shared:
            if not output.requires_grad:
                output.requires_grad_()
            self._note(SHARED_SUM, SHARED_SUM.operands(s, output), {"shared": s.name}, output)
        return output

    def backward(self, total: Tensor) -> None:
        """Compute the gradient of every recorded call by one backward pass through the activations."""
        if not self.edges or not total.requires_grad:
            return
        for call, gradient in zip(self.calls, torch.autograd.grad(total, self.edges, allow_unused=True), strict=True):
            call.gradient = gradient
        self.edges.clear()  # they keep the graph alive

    def _linear(self, *args: Any, **kwargs: Any) -> Any:
        """``F.linear``, recorded if an operand is a trainable parameter; used inside composite operations."""
        if not any(id(a) in self.names for a in (*args, *kwargs.values())):
            return _LINEAR(*args, **kwargs)
        return self._record(RULES[_LINEAR], _LINEAR, args, kwargs)

    def _record(self, rule: LayerRule, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            operands = rule.operands(*args, **kwargs)
        except TypeError:  # the signature of another torch version: the self-check will choose the general path
            operands = None
        output = func(*args, **kwargs)
        if operands is None or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        names = {role: self.names[id(p)] for role, p in operands.parameters.items() if id(p) in self.names}
        if not names:
            return output
        leaf = not output.requires_grad
        if leaf:
            output.requires_grad_()
        self._note(rule, operands, names, output)
        return output.clone() if leaf and self.copy_leaves else output

    def _note(self, rule: LayerRule, operands: Operands, names: Mapping[str, str], output: Tensor) -> None:
        # The edge, not the tensor: if the model changes the output in place later, the tensor is the new value and the
        # edge still belongs to the old one.
        self.edges.append(get_gradient_edge(output))
        self.calls.append(Call(rule, _detached(operands), names, tuple(output.shape)))

    def _attention(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run multi-head attention with ``F.linear`` replaced: its weights are passed to one composite function."""
        with restoring([F], "linear"):
            F.linear = self._linear
            return func(*args, **kwargs)


def _operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    for operand in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(operand, (list, tuple)):
            yield from operand
        else:
            yield operand


def _raised(tensor: T) -> T:
    """A tensor of 16 bits in float32; anything else as it is."""
    return tensor.float() if isinstance(tensor, Tensor) and is_half(tensor) else tensor


def _detached(operands: Operands) -> Operands:
    parameters = {role: None if p is None else p.detach() for role, p in operands.parameters.items()}
    return Operands(parameters, operands.input.detach(), operands.positions, operands.options)
