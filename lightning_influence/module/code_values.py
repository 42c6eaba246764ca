"""Small values that a module's code reads and no module holds: class attributes, globals, what a closure keeps."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType
from typing import Any

from torch import nn

from lightning_influence.module.numbers import NOTHING, NumberRecord, encoded, same
from lightning_influence.module.snapshot import is_plain_object
from lightning_influence.types import is_own

# Functions that are looked through at most.
_FUNCTIONS = 300
_SHOWN = 3

_Read = Callable[[], Any]


class CodeValues:
    """Notices which of these values a fit changes; they are not recorded.

    It makes a note at most, and meets objects of any class: what one of them raises ends the search, not the record.

    Args:
        module: of the fit, at its start.
    """

    def __init__(self, module: nn.Module) -> None:
        self._reads: dict[str, _Read] = {}
        self._first: dict[str, Any] = {}
        self._changed: set[str] = set()
        with contextlib.suppress(Exception):
            for path, read in _values_of(module):
                if (value := encoded(read())) is not NOTHING:
                    self._reads[path], self._first[path] = read, value

    def note(self) -> None:
        """Compare the present values with the first ones."""
        with contextlib.suppress(Exception):
            for path, value in self._first.items():
                if path not in self._changed and not same(value, encoded(self._reads[path]())):
                    self._changed.add(path)

    @property
    def doubt(self) -> str | None:
        """A sentence on those that the fit changed; None if there are none."""
        if not self._changed:
            return None
        names = sorted(self._changed)
        shown = ", ".join(f"`{name}`" for name in names[:_SHOWN]) + (" and others" if len(names) > _SHOWN else "")
        return (
            f"The fit changed {shown}, which the module's code reads and no module holds: the loss at each checkpoint "
            "is that with the present value. If the loss depends on it, keep it as an attribute of the module, whose "
            "changes are recorded, and fit again."
        )


class ValueRecord(NumberRecord):
    """Notes the small values of a module and of its code; those of the code are not recorded."""

    def __init__(self, module: nn.Module, resumed: bool) -> None:
        super().__init__(module, resumed)
        self._code = CodeValues(module)
        self._said: str | None = None

    def note(self, step: int) -> None:
        """Note the present values; see ``NumberRecord``."""
        super().note(step)
        self._code.note()

    def write(self, manifest: dict[str, Any]) -> None:
        """Write what has changed since the start of the fit into a manifest."""
        manifest["numbers"], doubt = self.changed, self._code.doubt
        if doubt != self._said:
            manifest["notes"][:] = [note for note in manifest["notes"] if note != self._said] + [str(doubt)]
            self._said = doubt


def _values_of(module: nn.Module) -> Iterator[tuple[str, _Read]]:
    """How to read each value, by a name for it."""
    classes = {cls: None for part in module.modules() for cls in type(part).__mro__ if is_own(cls)}
    functions: list[FunctionType] = []
    for cls in classes:
        for name, value in list(vars(cls).items()):
            if isinstance(function := _function(value), FunctionType):
                functions.append(function)
            elif not name.startswith("__"):
                yield from _with_parts(f"{cls.__name__}.{name}", partial(vars(cls).get, name, NOTHING))
    visited: set[int] = set()
    while functions and len(visited) < _FUNCTIONS:
        function = functions.pop(0)
        if id(function) not in visited and is_own(function):
            visited.add(id(function))
            for path, read in _names_in(function):
                if isinstance(inner := _function(read()), FunctionType):
                    functions.append(inner)
                else:
                    yield from _with_parts(path, read)


def _names_in(function: FunctionType) -> Iterator[tuple[str, _Read]]:
    """How to read what a function reads besides its arguments, by a name for it."""
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield f"{function.__module__}.{name}", partial(function.__globals__.get, name, NOTHING)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield f"{function.__qualname__}: {name}", partial(_kept_by, cell)


def _kept_by(cell: CellType) -> Any:
    """What a closure keeps; nothing before it is assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return NOTHING


def _with_parts(path: str, read: _Read) -> Iterator[tuple[str, _Read]]:
    """A small value, and those in a dict or a plain object of a user's class."""
    value = read()
    yield path, read
    plain = type(value) is dict  # another one may do anything when it is read
    holds = plain or (is_plain_object(value) and is_own(type(value)))
    inside: Mapping[Any, Any] = value if plain else vars(value) if holds else {}
    for key in list(inside)[:_FUNCTIONS]:
        yield f"{path}[{key!r}]" if plain else f"{path}.{key}", partial(inside.get, key, NOTHING)


def _function(value: Any) -> Any:
    """The function behind a method, property or wrapper."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    return inspect.unwrap(value) if callable(value) else value
