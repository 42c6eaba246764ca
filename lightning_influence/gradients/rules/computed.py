"""Weights that are computed from parameters alone: masked, normalised, merged of several, slices, positions."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from lightning_influence.gradients.derivations import Constant, Replayed, Selection

Values = Mapping[int, Tensor]
"""Values of parameters and constants, by ``id`` of the tensor."""


@dataclass(frozen=True, eq=False)
class Source:
    """A parameter.

    Args:
        value: the tensor.
        parameters: what it is computed from, by name.
        by_index: whether it depends on indices that may be of the batch's.
    """

    value: Tensor
    parameters: Mapping[str, Tensor]
    by_index: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return tuple(self.parameters)

    @property
    def looked_up(self) -> bool:
        """Whether it is what the rule for embeddings has recorded already."""
        return False

    @property
    def key(self) -> Hashable:
        """Identifies the value."""
        return (self.names, self.value._version, self.value.data_ptr())

    def replayed(self, values: Values) -> Tensor:
        """The tensor, computed from other values of the parameters."""
        return values[id(self.value)]

    def constants(self) -> Iterator[Tensor]:
        """The other tensors that it is computed from."""
        return iter(())

    def is_weight(self, shape: Sequence[int] | None) -> bool:
        """Whether an operation takes it as one for all examples.

        Args:
            shape: of a sum or product with activations; None: it is passed to another function.
        """
        if type(self) is Source:
            return True
        return not self.by_index if shape is None else self.is_shared_in(shape)

    def is_shared_in(self, shape: Sequence[int]) -> bool:
        """Whether all examples share this tensor in a sum or product of that shape.

        A look-up with ids of each example's own is left to the rule for embeddings.
        """
        aligned = (1,) * (len(shape) - self.value.ndim) + tuple(self.value.shape)
        return aligned[:1] == (1,) and (shape[0] > 1 or not self.looked_up)


@dataclass(frozen=True, eq=False)
class View(Source):
    """A view of another one, in which no entry is repeated: a slice, a transpose, another shape."""

    base: Source = None  # type: ignore[assignment]

    @cached_property
    def selection(self) -> Selection:
        """Of the base's entries."""
        own, base = self.value, self.value._base  # or the base in another precision
        assert base is not None
        start = int(own.storage_offset() - base.storage_offset())
        return Selection(tuple(base.shape), tuple(own.shape), own.stride(), start)

    @property
    def looked_up(self) -> bool:
        """Whether the base is."""
        return self.base.looked_up

    @property
    def key(self) -> Hashable:
        """Identifies the value."""
        return self.selection, self.base.key

    def constants(self) -> Iterator[Tensor]:
        """Those of the base."""
        return self.base.constants()

    def replayed(self, values: Values) -> Tensor:
        """The same view of the base."""
        return self.selection.forward([self.base.replayed(values)[None]])[0]

    def is_shared_in(self, shape: Sequence[int]) -> bool:
        """Positions may come first, in activations with the time first."""
        return not self.looked_up or super().is_shared_in(shape)


@dataclass(frozen=True, eq=False)
class Result(Source):
    """What a function returned for operands of which some are computed from parameters, the others are constants.

    Args:
        func: the function.
        args: its arguments.
        kwargs: likewise.
        sources: its operands that are computed from parameters, by ``id``.
    """

    func: Callable[..., Any] = torch.add
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = None  # type: ignore[assignment]
    sources: Mapping[int, Source] = None  # type: ignore[assignment]

    @property
    def looked_up(self) -> bool:
        """Whether it is a look-up, or made from one."""
        return self.func is F.embedding or any(source.looked_up for source in self.sources.values())

    @cached_property
    def key(self) -> Hashable:  # type: ignore[override]
        """Identifies the value."""
        return self.func, self._key(self.args), self._key(tuple(sorted(self.kwargs.items())))

    def _key(self, of: Any) -> Hashable:
        if isinstance(of, (list, tuple)):
            return tuple(self._key(one) for one in of)
        if isinstance(of, slice):
            return "slice", of.start, of.stop, of.step
        if id(of) in self.sources:
            return self.sources[id(of)].key
        if isinstance(of, Tensor):
            return Constant(of)
        return of if isinstance(of, Hashable) else id(of)

    def constants(self) -> Iterator[Tensor]:
        """Among its operands, and those of the sources."""
        for operand in tree_leaves((self.args, dict(self.kwargs))):
            if id(operand) in self.sources:
                yield from self.sources[id(operand)].constants()
            elif isinstance(operand, Tensor):
                yield operand

    def replayed(self, values: Values) -> Tensor:
        """The function's result."""

        def operand(of: Any) -> Any:
            if id(of) in self.sources:
                return self.sources[id(of)].replayed(values)
            return values[id(of)] if isinstance(of, Tensor) else of

        args, kwargs = tree_map(operand, (self.args, dict(self.kwargs)))
        return self.func(*args, **kwargs)  # type: ignore[no-any-return]


def replay(source: Source) -> Replayed:
    """How a tensor is computed, run again; constants are copied, since they may change before it is differentiated."""
    constants = {id(tensor): tensor.detach().clone() for tensor in source.constants()}

    def make(*values: Tensor) -> Tensor:
        return source.replayed(constants | {id(p): v for p, v in zip(source.parameters.values(), values, strict=True)})

    return Replayed(make, list(source.parameters.values()), source.key)
