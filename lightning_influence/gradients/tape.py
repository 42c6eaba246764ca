"""Records every operation that uses a trainable parameter, and the gradient with respect to its output."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from lightning_influence.gradients.branches import PassBranch
from lightning_influence.gradients.layout import Taken
from lightning_influence.gradients.rules import RULES, LayerRule, Operands
from lightning_influence.gradients.rules.computed import Result, Source, View
from lightning_influence.gradients.rules.elementwise import ELEMENTWISE
from lightning_influence.gradients.rules.recurrent import RECURRENT, unrolled
from lightning_influence.gradients.spot_checks import SuspectRows
from lightning_influence.gradients.taken import TakenRows
from lightning_influence.module.precision import is_half
from lightning_influence.module.snapshot import holding
from lightning_influence.module.torch_functions import (
    Args,
    Function,
    FunctionWatch,
    Kwargs,
    functions_named,
    operands_of,
    words,
    writes,
)
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
        sources: by role, a trainable parameter or what is computed from some, such as ``{"weight": ...}``.
        shape: the shape of its output.
        taken: which rows it was applied to, if they were taken by index out of others.
        gradient: the gradient with respect to its output; None if the loss does not depend on it.
    """

    rule: LayerRule
    operands: Operands
    sources: Mapping[str, Source]
    shape: tuple[int, ...]
    taken: Taken | None = None
    gradient: Tensor | None = field(default=None)

    @property
    def names(self) -> frozenset[str]:
        """All parameters that it depends on."""
        return frozenset().union(*(source.names for source in self.sources.values()))

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


class Tape(FunctionWatch):
    """While active, records each call of a torch function with a trainable parameter among its operands.

    It intercepts functions, not modules, so that reused and tied modules, ``nn.MultiheadAttention`` and functional
    uses of a weight are all covered. The parameters do not require gradients meanwhile, so that no weight gradients
    are computed. What is computed from parameters and constants alone, such as a masked weight, is followed, and an
    operation that it is passed to is recorded as one with a parameter is.

    Args:
        parameters: the parameters by name.
        constants: tensors that are no activations, such as buffers.
        copy_leaves: return copies of the outputs that become leaves, for models that write into them in place.
        watch: called with every function call; None: nobody watches.
        examples: how many the batch has.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        constants: Iterable[Tensor] = (),
        copy_leaves: bool = False,
        watch: SuspectRows | None = None,
        examples: int = 1,
    ) -> None:
        super().__init__()
        self.copy_leaves = copy_leaves
        self.watch = watch
        self.calls: list[Call] = []
        self.total: Tensor | None = None
        self.uses: set[Use] = set()
        self.edges: list[Any] = []
        self.branch = PassBranch(examples)
        self._known: dict[int, Source] = {id(p): Source(p, {name: p}) for name, p in parameters.items()}
        self._taken = TakenRows()
        self._data: dict[int, tuple[Tensor, Tensor]] = {}  # what ``.data`` returned, and of which tensor
        self._casts: list[Tensor] = []  # kept, so that no other tensor has the id of one
        self._constants = {id(tensor): tensor for tensor in constants if id(tensor) not in self._known}

    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run and record ``func``; its result is unchanged, except that it may require a gradient."""
        if self.watch is not None:
            self.watch(func, args, kwargs)
        sources = {id(a): s for a in operands_of(args, kwargs) if (s := self._source(a)) is not None}
        name = getattr(func, "__name__", "")
        self.branch.add(func, (*args, *kwargs.values()), (name for source in sources.values() for name in source.names))
        if not sources or not torch.is_grad_enabled() or name == "__get__":
            output = func(*args, **kwargs)
            self.branch.returned(func, output)
            if not sources:
                self._follow_constants(func, args, kwargs, output)
                self._taken.follow(func, args, kwargs, output)
            return output
        if func in _CASTS and type(sources.get(id(args[0]))) is Source and is_half(output := func(*args, **kwargs)):
            self._known[id(output)] = sources[id(args[0])]  # it stands for the parameter
            self._casts.append(output)
            return output
        self.uses.update((name, func) for source in sources.values() for name in source.names)
        if in_transform():  # the self-check sends these parameters to the general path
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        if func in RECURRENT and not kwargs:
            output = unrolled(self._linear, func, args)
            return func(*args) if output is None else output
        rule = RULES.get(func)
        output = func(*args, **kwargs) if rule is None else self._record(rule, func, args, kwargs, sources)
        self._taken.follow(func, args, kwargs, output)
        if writes(func):
            self._forget(next(operands_of(args, kwargs)))  # `nn.init` passes it by name
        elif isinstance(output, Tensor) and id(output) not in self._known:
            if output.is_floating_point():
                self._follow(func, args, kwargs, sources, output)
            else:
                self._constants[id(output)] = output
        return output

    def _source(self, operand: Any) -> Source | None:
        """Where a tensor comes from, if it is a parameter, is computed from some, or is a view of such a tensor."""
        if not isinstance(operand, Tensor):
            return None
        known = self._known.get(id(operand))
        if known is not None or operand._base is None:
            return known
        base = self._known.get(id(operand._base))
        if base is None or operand.dtype != operand._base.dtype or not operand._base.is_contiguous():
            return None
        if any(step == 0 and size > 1 for size, step in zip(operand.shape, operand.stride(), strict=True)):
            return None
        return View(operand, base.parameters, base.by_index, base)

    def _follow(
        self, func: Function, args: Args, kwargs: Kwargs, sources: Mapping[int, Source], output: Tensor
    ) -> None:
        """Note how ``output`` is computed, if from parameters and constants alone."""
        if func in _REPEATS or output._base is not None or any(word in func.__name__ for word in _RANDOM):
            return
        by_index = any(source.by_index for source in sources.values())
        if by_index and func not in _COPIES:  # it may be of the batch, as everything that is computed from it
            return
        for operand in operands_of(args, kwargs):
            if isinstance(operand, Tensor) and id(operand) not in sources and id(operand) not in self._constants:
                if operand.is_floating_point() or operand.is_complex() or operand.requires_grad:
                    return
                by_index = True
        parameters = {name: p for source in sources.values() for name, p in source.parameters.items()}
        self._known[id(output)] = Result(output, parameters, by_index, func, tuple(args), kwargs, sources)

    def _follow_constants(self, func: Function, args: Args, kwargs: Kwargs, output: Any) -> None:
        """Note what is computed from constants alone; one written to through ``.data``, unversioned, is none."""
        name = getattr(func, "__name__", "")
        if name == "__get__" and func == _DATA:
            self._data[id(output)] = output, args[0]
        elif name == "__set__":
            self._no_constant(args[0])
        elif self._data and writes(func):
            written = next(operands_of(args, kwargs), None)
            for tensor in (written, getattr(written, "_base", None)):
                self._no_constant(self._data.get(id(tensor), (None, None))[1])
        tensors = [a for a in operands_of(args, kwargs) if isinstance(a, Tensor)]
        if tensors and isinstance(output, Tensor) and all(id(a) in self._constants for a in tensors):
            self._constants[id(output)] = output

    def _no_constant(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            for one in (tensor, tensor._base):
                self._constants.pop(id(one), None)

    def _forget(self, written: Tensor) -> None:
        """What is written to in place is no longer what it was computed as."""
        for tensor in (written, getattr(written, "_base", None)):
            if isinstance(self._known.get(id(tensor)), Result):
                del self._known[id(tensor)]

    def backward(self, total: Tensor) -> None:
        """Compute the gradient of every recorded call by one backward pass through the activations."""
        if not self.edges or not total.requires_grad:
            return
        for call, gradient in zip(self.calls, torch.autograd.grad(total, self.edges, allow_unused=True), strict=True):
            call.gradient = gradient
        self.edges.clear()  # they keep the graph alive

    def _linear(self, *args: Any, **kwargs: Any) -> Any:
        """``F.linear``, recorded if an operand is a trainable parameter; used inside composite operations."""
        sources = {id(a): s for a in (*args, *kwargs.values()) if (s := self._source(a)) is not None}
        return self._record(RULES[_LINEAR], _LINEAR, args, kwargs, sources) if sources else _LINEAR(*args, **kwargs)

    def _record(
        self, rule: LayerRule, func: Function, args: Args, kwargs: Kwargs, sources: Mapping[int, Source]
    ) -> Any:
        try:
            operands = rule.operands(*args, **kwargs)
        except TypeError:  # the signature of another torch version: the self-check will choose the general path
            operands = None
        if operands is None:
            return func(*args, **kwargs)
        found = {role: sources[id(p)] for role, p in operands.parameters.items() if id(p) in sources}
        if any(type(source) is not Source for source in found.values()):
            shapes = (a.shape for a in args if isinstance(a, Tensor))
            shape = torch.broadcast_shapes(*shapes) if func in ELEMENTWISE else None
            found = {role: s for role, s in found.items() if s.is_weight(shape)}
        # They may have become leaves where they were computed; the gradient is taken from this operation's output.
        own = {id(s.value): s.value.detach() for s in found.values() if s.value.requires_grad}
        args, kwargs = [own.get(id(a), a) for a in args], {key: own.get(id(a), a) for key, a in kwargs.items()}
        output = func(*args, **kwargs)
        if not found or not isinstance(output, Tensor) or not output.is_floating_point() or output.is_nested:
            return output
        leaf = not output.requires_grad
        if leaf:
            output.requires_grad_()
        # The edge, not the tensor: if the model changes the output in place later, the tensor is the new value and the
        # edge still belongs to the old one.
        self.edges.append(get_gradient_edge(output))
        taken = self._taken.of(operands_of(args, kwargs), *output.shape[:1]) if output.ndim else None
        self.calls.append(Call(rule, _detached(operands), found, tuple(output.shape), taken))
        return output.clone() if leaf and self.copy_leaves else output

    def _attention(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run multi-head attention with ``F.linear`` replaced: its weights are passed to one composite function."""
        with holding([F], "linear", self._linear):
            return func(*args, **kwargs)


_REPEATS = functions_named("expand expand_as repeat broadcast_to tile")
_COPIES = functions_named("contiguous reshape flatten clone")
_RANDOM = words("dropout rand bernoulli multinomial normal_ gumbel rrelu gamma dirichlet fractional")
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


def constants_of(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a module holds: buffers, parameters, and attributes."""
    for part in module.modules():
        for held in (part._buffers, part._parameters, part.__dict__):
            yield from (tensor for tensor in held.values() if isinstance(tensor, Tensor))


def _raised(tensor: T) -> T:
    """A tensor of 16 bits in float32; anything else as it is."""
    return tensor.float() if isinstance(tensor, Tensor) and is_half(tensor) else tensor


def _detached(operands: Operands) -> Operands:
    parameters = {role: None if p is None else p.detach() for role, p in operands.parameters.items()}
    return Operands(parameters, operands.input.detach(), operands.positions, operands.options)
