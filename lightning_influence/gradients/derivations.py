"""How a weight is computed from parameters: its derivative, applied to gradients (back) and to vectors (forward)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_influence.gradients.part import TRAFFIC
from lightning_influence.gradients.vjp import named, vjp


class Derivation(ABC):
    """The derivative J of a computed weight with respect to the parameters that it is computed from."""

    shapes: tuple[tuple[int, ...], ...]
    """Of the parameters."""
    key: Hashable
    """Two derivations with the same key have the same J."""

    @abstractmethod
    def back(self, rows: Tensor) -> tuple[Tensor, ...]:
        """J^T times gradients by the weight, [example, *weight shape]: [example, *shape] for each parameter."""

    @abstractmethod
    def forward(self, vectors: Sequence[Tensor]) -> Tensor:
        """J times vectors, [vector, *shape] for each parameter: [vector, *weight shape]."""

    def only(self, which: int) -> "Derivation":
        """With respect to one of the parameters."""
        return self


@dataclass(frozen=True)
class Selection(Derivation):
    """A weight that consists of entries of one parameter, each at most once: a slice, a transpose, another shape.

    Args:
        shape: of the parameter, whose entries are contiguous.
        size: of the weight.
        stride: of the weight in the parameter's memory.
        offset: of its first entry.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:  # type: ignore[override]
        """The parameter's shape."""
        return (self.shape,)

    @property
    def key(self) -> Hashable:  # type: ignore[override]
        """All of it."""
        return self

    def _within(self, rows: Tensor) -> Tensor:
        """The selected entries of contiguous rows [row, *shape], as a view."""
        step = torch.Size(self.shape).numel()
        start = self.offset + rows.storage_offset()
        return rows.as_strided((len(rows), *self.size), (step, *self.stride), start)

    def back(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Zeros for entries that are not selected."""
        found = rows.new_zeros(len(rows), *self.shape)
        self._within(found).copy_(rows.reshape(len(rows), *self.size))
        return (found,)

    def forward(self, vectors: Sequence[Tensor]) -> Tensor:
        """The selected entries."""
        return self._within(vectors[0].contiguous())

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Selection":
        """All entries of a parameter, as it is."""
        return cls(tuple(shape), tuple(shape), torch.empty(shape, device="meta").stride(), 0)

    def of(self, base: "Selection") -> "Selection | None":
        """The same entries, where what they are selected from is a selection itself; None if there is no stride."""
        lengths = torch.empty(self.shape, device="meta").stride()
        starts = [self.offset // length % n for length, n in zip(lengths, self.shape, strict=True)]
        dims = {length: i for i, length in enumerate(lengths) if self.shape[i] > 1}
        stride = []
        for n, step in zip(self.size, self.stride, strict=True):
            if n > 1 and (step not in dims or starts[dims[step]] + n > self.shape[dims[step]]):
                return None
            stride.append(base.stride[dims[step]] if n > 1 else 0)
        offset = base.offset + sum(start * step for start, step in zip(starts, base.stride, strict=True))
        return Selection(base.shape, self.size, tuple(stride), offset)

    def overlaps(self, other: "Selection") -> bool:
        """Whether any entry is in both."""
        return _overlap(self, other)


@lru_cache(1024)
def _overlap(one: Selection, other: Selection) -> bool:
    first, second = (
        of.offset + sum((n - 1) * s for n, s in zip(of.size, of.stride, strict=True)) for of in (one, other)
    )
    if first < other.offset or second < one.offset:  # the last entry of one lies before all of the other
        return False
    marks = torch.zeros(1, torch.Size(one.shape).numel(), dtype=torch.bool)
    one._within(marks).fill_(True)
    return bool(other._within(marks).any())


class Constant:
    """A constant as a key: the same tensor with the same values, in the same memory, which is kept meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version, self.memory = tensor, tensor._version, tensor.detach()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant) or self.tensor is not other.tensor or self.version != other.version:
            return False
        return self.memory.data_ptr() == other.memory.data_ptr()

    def __hash__(self) -> int:
        return hash((id(self.tensor), self.version))


@dataclass(frozen=True)
class Tiles:
    """A matrix with few distinct rows and columns, as masks have whose rows are nested.

    Args:
        rows: the indices of equal rows, [distinct row, most that are equal]; the number of rows where there are fewer.
        columns: likewise.
        table: [distinct row, distinct column]: the entries.
    """

    rows: Tensor
    columns: Tensor
    table: Tensor


class Elementwise(Derivation):
    """A parameter times a constant, such as a mask; its values are copied, since they may change.

    Args:
        constant: the constant.
        shape: of the parameter.
    """

    def __init__(self, constant: Tensor, shape: Sequence[int]) -> None:
        self.constant = Constant(constant)
        self.key = self.constant, tuple(shape)
        self.shapes = (tuple(shape),)
        self.factor = constant.detach().expand(shape).clone()

    def back(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Times the constant."""
        return (rows * self.factor.to(rows),)

    def forward(self, vectors: Sequence[Tensor]) -> Tensor:
        """Times the constant."""
        return vectors[0] * self.factor.to(vectors[0])

    @cached_property
    def tiles(self) -> Tiles | None:
        """The constant by its distinct rows and columns; None unless they are few."""
        rows, row_of = self.factor.flatten(1).unique(dim=0, return_inverse=True)
        table, column_of = rows.unique(dim=1, return_inverse=True)
        found = Tiles(_equal(row_of), _equal(column_of), table)
        operations = found.rows.numel() + found.columns.numel() + table.numel() + TRAFFIC * sum(table.shape)
        return found if operations < self.factor.numel() / 2 else None


def _equal(which: Tensor) -> Tensor:
    """The indices of each group in one row, filled up with their total number."""
    groups = which.argsort(stable=True).split(which.bincount().tolist())
    return pad_sequence(groups, batch_first=True, padding_value=len(which))


class Replayed(Derivation):
    """Any computation, run again under autograd once its derivative is needed.

    Args:
        make: computes the weight from the parameters.
        parameters: their values, which are copied: they may change before J is used.
        key: identifies the computation and the values.
    """

    def __init__(self, make: Callable[..., Tensor], parameters: Sequence[Tensor], key: Hashable) -> None:
        self.key = key
        self.shapes = tuple(tuple(p.shape) for p in parameters)
        self._make = make
        self._given = dict(enumerate(p.detach().clone() for p in parameters))

    @cached_property
    def _value(self) -> Tensor:
        with torch.enable_grad():
            return self._make(*(p.requires_grad_() for p in self._given.values()))

    @cached_property
    def _weight(self) -> Tensor:
        """What is multiplied with J^T, which is linear in it."""
        return torch.zeros_like(self._value, requires_grad=True)

    @cached_property
    def _transposed(self) -> dict[int, Tensor]:
        """J^T times the weight, by parameter, with its graph; absent where the value does not depend on one."""
        if not self._value.requires_grad:
            return {}
        with torch.enable_grad():
            found = torch.autograd.grad(
                self._value, [*self._given.values()], self._weight, create_graph=True, allow_unused=True
            )
        return named(self._given, found)

    def back(self, rows: Tensor) -> tuple[Tensor, ...]:
        """By a vectorised backward pass."""
        found = vjp(
            {0: self._value},
            self._given,
            {0: rows.reshape(len(rows), *self._value.shape).to(self._value)},
            self._value.numel(),
        )
        return tuple(
            found[i].to(rows) if i in found else rows.new_zeros(len(rows), *shape)
            for i, shape in enumerate(self.shapes)
        )

    def forward(self, vectors: Sequence[Tensor]) -> Tensor:
        """By the derivative of J^T w with respect to w."""
        return self.forward_of(dict(enumerate(vectors)))

    def forward_of(self, vectors: Mapping[int, Tensor]) -> Tensor:
        """The same for some of the parameters; the vectors of the others are zero."""
        like = next(iter(vectors.values()))
        wanted = {i: v.to(self._weight) for i, v in vectors.items() if i in self._transposed}
        found = vjp(self._transposed, {0: self._weight}, wanted, self._value.numel())
        return found[0].to(like) if found else like.new_zeros(len(like), *self._weight.shape)

    def only(self, which: int) -> Derivation:
        """With respect to one of the parameters."""
        return _OneOf(self, which) if len(self.shapes) > 1 else self


@dataclass(frozen=True)
class _OneOf(Derivation):
    """A derivation with respect to one of its parameters."""

    whole: Replayed
    which: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:  # type: ignore[override]
        return (self.whole.shapes[self.which],)

    @property
    def key(self) -> Hashable:  # type: ignore[override]
        return self.whole.key, self.which

    def back(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (self.whole.back(rows)[self.which],)

    def forward(self, vectors: Sequence[Tensor]) -> Tensor:
        return self.whole.forward_of({self.which: vectors[0]})
