"""Snapshots of a module's attributes, containers and buffers, to undo what a forward pass changes in them."""

from collections import deque
from collections.abc import Iterator, Mapping
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
        found: dict[int, Tensor] = {}
        visited: set[int] = set()
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if _is_hooks(name):
                    continue
                if isinstance(value, Tensor):
                    found[id(value)] = value
                elif isinstance(value, (list, tuple, dict, set, deque)):
                    for inner in self._follow(value, visited):
                        found[id(inner)] = inner
        tensors = [t for t in found.values() if not t.is_inference() and not isinstance(t, nn.Parameter)]
        self._tensors = [(t, t._version, None if t.numel() > _LARGE else t.detach().clone()) for t in tensors]

    def _follow(self, container: Any, visited: set[int]) -> Iterator[Tensor]:
        """Record a container and the containers inside it; yield the tensors they hold."""
        if id(container) in visited:
            return
        visited.add(id(container))
        if not isinstance(container, tuple):
            self._containers.append((container, container.copy()))
        for value in container.values() if isinstance(container, Mapping) else container:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple, dict, set, deque)):
                yield from self._follow(value, visited)

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
            _refill(container, content)
        for i, (tensor, version, value) in enumerate(self._tensors):
            if tensor._version != version:
                if value is None:
                    raise RuntimeError(
                        f"Expected the forward pass in eval mode not to write into large buffers, got a write into one "
                        f"of shape {tuple(tensor.shape)}. Write into it only if `self.training` is true."
                    )
                tensor.data.copy_(value)
                self._tensors[i] = (tensor, tensor._version, value)


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


def _refill(container: Any, content: Any) -> None:
    if isinstance(content, dict):
        if _same_objects(container, content):
            return
    elif len(container) == len(content):
        if isinstance(content, set):
            if container == content:
                return
        elif all(map(is_, container, content)):
            return
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)
