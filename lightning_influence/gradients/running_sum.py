"""The sum of the gradients of the same examples at several sets of weights."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from lightning_influence.devices import workspace
from lightning_influence.gradients.block import Gradients, Names, aligned
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.sum_of_parts import sum_of


class RunningSum:
    """Adds up the gradients of a block of examples, at one set of weights after another.

    A part stays in its own form, such as outer products over the positions of all sets of weights, as long as that
    takes less memory than dense gradients do.
    """

    def __init__(self) -> None:
        self._parts: dict[Names, _PartSum] = {}
        self._groups: dict[Names, int] = {}
        self._size = 0

    def add(self, gradients: Gradients) -> None:
        """Add the gradients of the same examples at other weights."""
        if not aligned(self._parts, gradients.parts):
            before, self._parts, self._groups = self.result(), {}, {}
            self.add(before.per_parameter())
            gradients = gradients.per_parameter()
        for names, part in gradients.parts.items():
            self._parts.setdefault(names, _PartSum(len(names) == 1)).add(part)
            self._groups[names] = gradients.groups.get(names, 0)
        self._size = len(gradients)

    def result(self) -> Gradients:
        """The sum so far."""
        return Gradients({names: of.result() for names, of in self._parts.items()}, self._groups, self._size)


@dataclass
class _PartSum:
    """The sum of one part.

    Args:
        mixes: whether parts of different forms may stay apart: only those of a single parameter.
        rows: the dense sum, [example, *shape] for each parameter; () while there is none.
        waiting: what is to be added to it.
    """

    mixes: bool
    rows: tuple[Tensor, ...] = ()
    waiting: list[Part] = field(default_factory=list)

    def add(self, part: Part) -> None:
        self.waiting.append(part)
        if sum(of.stored_bytes() for of in self.waiting) >= len(part) * _row_bytes(part):
            self._write()
        else:  # its tensors may be slices of large ones, or buffers that the module writes to
            self.waiting[-1] = _copied(part)

    def result(self) -> Part:
        alike = len({type(part) for part in self.waiting}) == 1
        if self.waiting and (self.rows or not (alike or self.mixes)):
            self._write()
        return DenseRows(self.rows) if self.rows else sum_of(self.waiting)

    def _write(self) -> None:
        first = self.waiting[0]
        if not self.rows:
            self.rows = tuple(first.like.new_zeros(len(first), *shape) for shape in first.shapes())
        each = max(_row_bytes(first), sum(part.query_bytes(1) for part in self.waiting))
        step = max(1, workspace(first.like.device) * first.like.element_size() // max(1, each))
        for start in range(0, len(first), step):
            some = slice(start, start + step)
            sum_of([part.slice(some) for part in self.waiting]).add_to(tuple(row[some] for row in self.rows))
        self.waiting.clear()


def _row_bytes(part: Part) -> int:
    """The bytes of one dense gradient."""
    return part.entries() * part.like.element_size()


def _copied(value: Any) -> Any:
    """A part with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_copied(each) for each in value)
    if isinstance(value, Part) and is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _copied(getattr(value, each.name)) for each in fields(value)})
    return value


@dataclass(frozen=True)
class SumCosts:
    """What it takes to multiply an example's gradients at several sets of weights with the same vectors.

    Args:
        bytes: of the sum of its gradients.
        summed: multiply-adds for adding them up before the product.
        apart: multiply-adds for one product per set of weights.
    """

    bytes: int
    summed: int
    apart: int

    @classmethod
    def of(cls, gradients: Gradients, count: int, n_vectors: int) -> "SumCosts":
        """From the gradients of some examples, for ``count`` sets of weights and ``n_vectors`` vectors."""
        held = summed = apart = 0
        for part in gradients.parts.values():
            one, row = part.stored_bytes() // max(1, len(part)), _row_bytes(part)
            held += one * count if one * count < row else 2 * row  # dense, and as much that is to be added
            each = count * part.operations(n_vectors)
            summed += min(each, count * part.adding_operations() + n_vectors * part.entries())
            apart += each
        return cls(held, summed, apart)
