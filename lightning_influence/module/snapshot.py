"""Snapshots of a module's attributes, containers and buffers, to undo what a forward pass changes in them."""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from operator import is_
from typing import Any

from torch import Tensor, nn

# A tensor of more elements than this is not copied: that would cost too much memory.
_LARGE = 2**26


class ModuleSnapshot:
    """The attributes and buffers of every submodule, which ``restore`` puts back.

    Lists, tuples, dicts, sets and deques are covered at any depth of nesting; changes inside other objects are not
    undone.
    """

    def __init__(self, module: nn.Module) -> None:
        self._attributes = [(m, dict(m.__dict__)) for m in module.modules()]
        self._containers: list[tuple[Any, Any]] = []
        values = [v for _, attributes in self._attributes for name, v in attributes.items() if not _is_hooks(name)]
        found = {id(tensor): tensor for tensor in self._tensors_in(values, set())}
        tensors = [t for t in found.values() if not t.is_inference() and not isinstance(t, nn.Parameter)]
        self._tensors = [(t, t._version, None if t.numel() > _LARGE else t.detach().clone()) for t in tensors]

    def _tensors_in(self, values: Iterable[Any], visited: set[int]) -> Iterator[Tensor]:
        """Yield the tensors among some values and in their containers, which are recorded."""
        for value in values:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple, dict, set, deque)) and id(value) not in visited:
                visited.add(id(value))
                if not isinstance(value, tuple):
                    self._containers.append((value, value.copy()))
                yield from self._tensors_in(value.values() if isinstance(value, dict) else value, visited)

    def restore(self) -> None:
        """Put back everything that has changed since the snapshot.

        Raises:
            RuntimeError: a tensor too large to be copied was written in place.
        """
        for module, attributes in self._attributes:
            now = module.__dict__
            if not _same_objects(now, attributes):
                now.clear()
                now.update(attributes)
        for container, content in self._containers:
            if not _same_content(container, content):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(content)
        for i, (tensor, version, value) in enumerate(self._tensors):
            if tensor._version != version:
                if value is None:
                    raise RuntimeError(
                        f"Expected the forward pass in eval mode not to write into large buffers, got a write into one "
                        f"of shape {tuple(tensor.shape)}. Write into it only if `self.training` is true."
                    )
                tensor.data.copy_(value)
                self._tensors[i] = (tensor, tensor._version, value)


@contextlib.contextmanager
def restoring(owners: Iterable[Any], name: str) -> Iterator[None]:
    """Restore one attribute of each of these objects afterwards."""
    before = [(owner, getattr(owner, name)) for owner in owners]
    try:
        yield
    finally:
        for owner, value in before:
            setattr(owner, name, value)


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
