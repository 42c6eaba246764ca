"""Snapshots of a module's attributes, containers and tensors, to undo what a forward pass changes in them."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter, is_
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset

from lightning_influence.devices import Readings
from lightning_influence.types import LIBRARIES

# Beyond so many elements in all, tensors are copied only once something writes into them.
_LARGE = 2**26
# How deep objects that are no modules are looked into, such as an average of the weights, and how long their lists are.
_DEPTH, _LONG = 2, 10_000

# What is known of the tensors of each module.
_KNOWN: "WeakKeyDictionary[nn.Module, _Known]" = WeakKeyDictionary()

_version_of = attrgetter("_version")


@dataclass
class _Saved:
    """A tensor, its memory, its version and its content; no content where it is not copied."""

    tensor: Tensor
    memory: Tensor
    version: int
    content: Tensor | None
    silent: bool = False  # written in ways that leave version and memory as they are, such as `.data.add_`

    @property
    def is_written(self) -> bool:
        return self.silent or self.tensor._version != self.version or not self.tensor.is_set_to(self.memory)


@dataclass
class _Known:
    """What passes of a module have written into.

    Args:
        written: ids of the tensors.
        silent: of those among them that kept their version and memory.
        readings: of what devices know of the module.
        unread: names of tensors, the tensors, and what reads whether a pass left their content as it was.
        compared: whether contents were compared, so that another comparison need not be waited for.
    """

    written: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    readings: Readings = field(default_factory=Readings)
    unread: list[tuple[str, Tensor, Callable[[], list[float]]]] = field(default_factory=list)
    compared: bool = False


def _known_of(module: nn.Module) -> _Known:
    return _KNOWN.setdefault(module, _Known())


def readings_of(module: nn.Module) -> Readings:
    """What devices know of a module and the host has yet to read."""
    return _known_of(module).readings


def read_comparisons(module: nn.Module) -> None:
    """Read whether passes of a module wrote into tensors in ways that nothing else shows.

    Raises:
        RuntimeError: one did, where those before did not: what was computed since is of other weights.
    """
    known = _known_of(module)
    unread, known.unread = known.unread, []
    found = {id(tensor): name for name, tensor, equal in unread if not equal()[0]}
    known.silent.update(found)
    for name in found.values():
        raise RuntimeError(
            f"Expected the forward pass to write into the same tensors each time, got a first write into {name} "
            "through `.data` or the like. Ask again, now that this is known; or write into it in `on_train_batch_end`."
        )


@contextlib.contextmanager
def comparing(module: nn.Module) -> Iterator[None]:
    """Passes inside may write into other tensors of a module than those before; see ``read_comparisons``."""
    _known_of(module).compared = False
    yield
    read_comparisons(module)


class ModuleSnapshot:
    """All attributes, parameters, buffers and other tensors of a module, which ``restore`` puts back.

    Lists, tuples, dicts, sets and deques are covered at any depth of nesting, and so are modules that are kept in them.
    Of other objects, such as a running average of the weights, the attributes are, two levels deep.

    Args:
        module: the module.
        thorough: copy parameters, and compare all contents after the first pass. Otherwise only those are copied, or
            taken to be written, that earlier passes wrote into; a write into another raises.
        parameters: whether parameters are watched at all.
    """

    def __init__(self, module: nn.Module, thorough: bool = True, parameters: bool = True) -> None:
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        found = {id(tensor): tensor for tensor in self._tensors_in([module], set(), 0)}
        tensors = [t for t in found.values() if _has_memory(t) and (parameters or id(t) not in self._names)]
        lazily = sum(t.numel() for t in tensors) > _LARGE
        self._known = _known_of(module)
        self._first = thorough
        self._saved = [
            _Saved(
                t,
                t.detach(),
                t._version,
                _copy(t, lazily) if self._is_copied(t) else None,
                not thorough and id(t) in self._known.silent,
            )
            for t in tensors
        ]
        self._any_silent = any(saved.silent for saved in self._saved)
        self._compared: Any = None

    def _tensors_in(self, values: Iterable[Any], visited: set[int], depth: int) -> Iterator[Tensor]:
        """Yield the tensors among some values, and in what they contain, which is recorded."""
        for value in values:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, nn.Module):
                yield from self._tensors_in_module(value, visited)
            elif isinstance(value, (list, tuple, dict, set, deque)):
                if id(value) not in visited and not (depth and len(value) > _LONG):
                    visited.add(id(value))
                    if not isinstance(value, tuple):
                        self._containers.append((value, value.copy()))
                    yield from self._tensors_in(value.values() if isinstance(value, dict) else value, visited, depth)
            elif depth < _DEPTH and is_plain_object(value) and id(value) not in visited:
                visited.add(id(value))
                self._attributes.append((value.__dict__, dict(value.__dict__)))
                yield from self._tensors_in(value.__dict__.values(), visited, depth + 1)

    def _tensors_in_module(self, module: nn.Module, visited: set[int]) -> Iterator[Tensor]:
        for part in module.modules():
            if id(part) not in visited:
                visited.add(id(part))
                attributes = dict(part.__dict__)
                self._attributes.append((part.__dict__, attributes))
                values = [value for name, value in attributes.items() if not _is_hooks(name)]
                yield from self._tensors_in(values, visited, 0)

    def restore(self) -> None:
        """Put back everything that has changed since the snapshot.

        Raises:
            RuntimeError: a tensor that was not copied was written in place.
        """
        self.restore_attributes()
        self.restore_tensors()

    def restore_attributes(self) -> None:
        """Put back attributes and the content of containers: which objects they hold."""
        for now, attributes in self._attributes:
            if not _same_objects(now, attributes):
                now.clear()
                now.update(attributes)
        for container, content in self._containers:
            if not _same_content(container, content):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(content)

    def written(self) -> list[_Saved]:
        """The tensors that were written; the first call compares their contents, later ones versions and memory."""
        first, self._first = self._first, False
        with torch._C.DisableTorchFunction():  # nothing here is part of the pass that a tape may record
            if not first and self._is_unchanged():
                return [saved for saved in self._saved if saved.silent] if self._any_silent else []
            if first:
                self._compare(self._saved)
            found = [saved for saved in self._saved if saved.is_written]
            self._any_silent = any(saved.silent for saved in self._saved)
            self._compared = None
            self._known.written.update(id(saved.tensor) for saved in found)
            self._known.silent.update(id(saved.tensor) for saved in found if saved.silent)
            return found

    def _compare(self, all_saved: Sequence[_Saved]) -> None:
        """Note which contents have changed though nothing else shows it; a device is waited for the first time only."""
        known = self._known
        elsewhere: list[tuple[_Saved, Tensor]] = []
        for saved in all_saved:
            if saved.content is None or saved.is_written:
                continue
            if saved.tensor.device.type == "cpu":
                saved.silent = not torch.equal(saved.tensor.detach(), saved.content)
            elif known.compared and id(saved.tensor) in known.silent:
                saved.silent = True
            else:
                elsewhere.append((saved, torch.eq(saved.tensor.detach(), saved.content).all()))
        if known.compared:
            for saved, equal in elsewhere:
                name = f"`{self._names.get(id(saved.tensor), 'a tensor')}` {tuple(saved.tensor.shape)}"
                known.unread.append((name, saved.tensor, known.readings.later(equal)))
        else:
            for (saved, _), (same,) in zip(elsewhere, known.readings.read([e for _, e in elsewhere]), strict=True):
                saved.silent = not same
            known.compared = bool(elsewhere)

    def _is_copied(self, tensor: Tensor) -> bool:
        return self._first or id(tensor) not in self._names or id(tensor) in self._known.written

    def _is_unchanged(self) -> bool:
        """Whether all tensors have their version and memory still; runs after every pass, hence the loops in C."""
        if self._compared is None:
            found = [(saved.tensor, saved.memory, saved.version) for saved in self._saved]
            self._compared = tuple(zip(*found, strict=True)) or ((), (), ())
        tensors, memories, versions = self._compared
        return tuple(map(_version_of, tensors)) == versions and all(map(Tensor.is_set_to, tensors, memories))

    def restore_tensors(self) -> None:
        """Put back the content of tensors. A graph that has saved one of them can no longer be differentiated."""
        written = self.written()
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for saved in written:
                self._put_back(saved)

    def _put_back(self, saved: _Saved) -> None:
        tensor = saved.tensor
        if not tensor.is_set_to(saved.memory):
            tensor.data = saved.memory
        elif saved.content is None:
            name = self._names.get(id(tensor), "a tensor")
            raise RuntimeError(
                f"Expected the forward pass to write into the same parameters each time, got a first write into "
                f"`{name}` {tuple(tensor.shape)}, which was not copied. Write into it in `on_train_batch_end` instead, "
                "or pass `loss=`, a callable (module, batch) -> [batch] of per-sample losses."
            )
        if saved.content is not None:
            tensor.copy_(saved.content)
        saved.version = tensor._version
        self._compared = None

    def written_parameters(self) -> list[str]:
        """Names of the module's parameters that were written since the snapshot."""
        parameters = [saved for saved in self._saved if id(saved.tensor) in self._names]
        with torch._C.DisableTorchFunction():
            if self._first:
                self._compare(parameters)
            return sorted(self._names[id(saved.tensor)] for saved in parameters if saved.is_written)

    def moved(self) -> None:
        """To be called by whoever gave tensors other memory: what they hold now is kept, parameters without a copy."""
        self._compared = None
        for saved in self._saved:
            if not saved.tensor.is_set_to(saved.memory):
                saved.memory, saved.version = saved.tensor.detach(), saved.tensor._version
                saved.content = _copy(saved.tensor, False) if self._is_copied(saved.tensor) else None


@contextlib.contextmanager
def restoring(owners: Iterable[Any], name: str) -> Iterator[None]:
    """Restore one attribute of each of these objects afterwards."""
    before = [(owner, getattr(owner, name)) for owner in owners]
    try:
        yield
    finally:
        for owner, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def holding(owners: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Give one attribute of each of these objects another value inside."""
    with restoring(owners, name):
        for owner in owners:
            setattr(owner, name, value)
        yield


def _copy(tensor: Tensor, lazily: bool) -> Tensor:
    """A copy; a lazy one shares the tensor's memory until something writes into either of them."""
    if lazily:
        with contextlib.suppress(RuntimeError):  # memory of another library, such as NumPy's
            return tensor.detach()._lazy_clone()
    return tensor.detach().clone()


def _has_memory(tensor: Tensor) -> bool:
    return not (tensor.is_inference() or is_lazy(tensor) or tensor.layout is not torch.strided)


def is_plain_object(value: Any) -> bool:
    """Whether this is an object of a user's own class, other than data, functions and what Lightning made."""
    kind = type(value)
    if not hasattr(value, "__dict__") or isinstance(value, (type, ModuleType, FunctionType, Dataset)):
        return False
    is_heap_type = bool(kind.__flags__ & 1 << 9)
    return is_heap_type and not any(base.__module__.partition(".")[0] in LIBRARIES for base in kind.__mro__)


@cache
def _is_hooks(name: str) -> bool:
    return name.endswith("_hooks") or "_hooks_" in name or name == "_modules"


def _same_objects(mine: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    """Whether both hold the very same objects; runs after every forward pass, hence the loops in C."""
    if len(mine) != len(other):
        return False
    if all(map(is_, mine.values(), other.values())) and all(map(is_, mine, other)):
        return True
    return all(mine.get(key, mine) is value for key, value in other.items())  # in another order


def _same_content(container: Any, content: Any) -> bool:
    if isinstance(content, dict):
        return _same_objects(container, content)
    if isinstance(content, set):
        return bool(container == content)
    return len(container) == len(content) and all(map(is_, container, content))
