"""Finds whether what a step computes depends on ``batch_idx``, the index of its batch in the epoch."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, partialmethod
from typing import Any

import torch
from torch import Tensor

Key = Callable[[int], Any]
"""A function of the index, on whose value the step's course depended."""

# Indices that are tried at most.
_TRIALS = 6
# Of more indices than this, as many are considered: the first, the last, and some between.
_CONSIDERED = 3000
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor")


def differing_indices(run: Callable[[Any], Mapping[str, Tensor] | None], met: Sequence[int]) -> tuple[int, int] | None:
    """Two indices for which a computation has other results; None if it has the same for all.

    The index that is passed writes down what it is compared with and what is computed from it, so that one trial
    stands for all indices that take the same course. If they are too many, those in between go untried.

    Args:
        run: computes tensors by name, given the index; None where it has none, as a batch without a loss.
        met: the indices in question, ascending.
    """
    met = _some_of(met)
    trials: list[tuple[int, list[Key]]] = []
    first: tuple[int, Mapping[str, Tensor]] | None = None
    for number in range(_TRIALS):
        left = [i for i in met if not any(_same_course(i, at, keys) for at, keys in trials)]
        if not left:
            return None
        index = left[(0, -1, 0, len(left) // 2)[number % 4]]
        keys: list[Key] = []
        try:
            found = _trial(run, index, keys)
        except Exception:
            if not trials:
                return None  # whoever needs the result meets the error
            found = None
        if found is not None and first is None:
            first = index, found
        elif found is not None and first is not None and _differ(first[1], found):
            again = run(first[0])  # what differs from itself tells nothing
            return None if again is None or _differ(first[1], again) else (first[0], index)
        trials.append((index, keys))
    return None


def _trial(run: Callable[[Any], Mapping[str, Tensor] | None], index: int, keys: list[Key]) -> Any:
    try:
        return run(WatchedIndex(index, keys))
    except Exception:  # what takes nothing but a plain integer, such as compiled code, may depend on it in any way
        keys.append(lambda i: i)
        return run(index)


def _some_of(met: Sequence[int]) -> Sequence[int]:
    if len(met) <= _CONSIDERED:
        return met
    part = _CONSIDERED // 3
    between = met[part:-part]
    return [*met[:part], *between[:: -(-len(between) // part)], *met[-part:]]


def _same_course(index: int, tried: int, keys: Iterable[Key]) -> bool:
    try:
        return all(key(index) == key(tried) for key in keys)
    except (ArithmeticError, ValueError):
        return False


def _differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether results differ by more than rounding; an absent tensor is zero."""
    for name in one.keys() | other.keys():
        a, b = one.get(name), other.get(name)
        a, b = torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b  # type: ignore[arg-type]
        if a.shape != b.shape:
            return True
        if not torch.equal(a, b):
            tolerance = 1e-10 if a.dtype is torch.float64 else 1e-5
            size = float(torch.maximum(a.abs().max(), b.abs().max()))
            if not torch.allclose(a, b, rtol=0.0, atol=tolerance * size, equal_nan=True):
                return True
    return False


class WatchedIndex:
    """Stands for an integer, and writes down the functions of it on whose values the course of a computation depends.

    Numbers computed from it are watched too. Not an ``int``, since C code reads those without a trace.

    Args:
        at: the integer.
        keys: the functions are appended here.
        of: this number as a function of the index; ``at`` is the index.
    """

    __slots__ = ("_at", "_keys", "_of")

    def __init__(self, at: int, keys: list[Key], of: Key = lambda i: i) -> None:
        self._at, self._keys, self._of = at, keys, of

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """``int``, for ``isinstance``."""
        return int

    def _value(self, convert: Callable[[Any], Any] = lambda number: number) -> Any:
        """The number itself or what it converts to, for a computation that is not followed."""
        own = self._of
        self._keys.append(lambda i: convert(own(i)))
        return convert(own(self._at))

    def _derived(self, function: Callable[..., Any], *others: Any) -> Any:
        """``function`` of this number and others, followed if these are numbers too."""
        if not all(type(other) in (WatchedIndex, int, float, bool) for other in others):
            return function(self._value(), *others)
        own = self._of

        def of(index: int) -> Any:
            return function(own(index), *(o._of(index) if type(o) is WatchedIndex else o for o in others))

        of(self._at)  # raises what the integer would
        return WatchedIndex(self._at, self._keys, of)

    def _compared(self, function: Callable[..., Any], *others: Any) -> Any:
        found = self._derived(function, *others)
        return found._value() if type(found) is WatchedIndex else found

    def _converted(self, function: Callable[..., Any], *others: Any) -> Any:
        return self._value(lambda number: function(number, *others))

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value(), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return int, (self._value(),)


def _swapped(function: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    return function(other, one)


def _operators() -> Iterator[tuple[str, Any]]:
    """Python's special methods of an integer."""
    derived, compared, converted = WatchedIndex._derived, WatchedIndex._compared, WatchedIndex._converted
    for name in _ARITHMETIC:
        function = getattr(operator, f"__{name}__")
        yield name, partialmethod(derived, function)
        yield f"r{name}", partialmethod(derived, partial(_swapped, function))
    for name in ("neg", "pos", "abs", "invert"):
        yield name, partialmethod(derived, getattr(operator, f"__{name}__"))
    for function in (round, math.floor, math.ceil, math.trunc):
        yield function.__name__, partialmethod(derived, function)
    for function in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, bool):
        yield function.__name__, partialmethod(compared, function)
    for function in (int, float, complex, hash, str, repr, format, operator.index):
        yield function.__name__, partialmethod(converted, function)


for _name, _method in _operators():
    setattr(WatchedIndex, f"__{_name}__", _method)
