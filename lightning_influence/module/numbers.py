"""Small values that a module keeps as plain attributes, and that hooks may change during a fit: the weight of a loss.

A path names each: ``net.beta``, ``hparams['beta']``, ``weights['kl']``, ``schedule.value``.
"""

import ast
import contextlib
import math
import sys
from collections import UserDict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.module.snapshot import is_plain_object
from lightning_influence.types import LIBRARIES, clean

History = Mapping[str, Sequence[tuple[int, Any]]]
"""(optimizer steps so far, value) by path: at the first checkpoint after the initial one, then each change.

Values are JSON: numbers, short strings and None as they are, others as a dict of their kind and content.
"""

# Entries of a list, tensor or array, letters of a string, keys of a dict or object that are recorded at most.
_ENTRIES, _KEYS = 64, 256
NOTHING = object()
"""Stands for a value that is not small."""
"""Stands for a value that is not small."""


class NumberRecord:
    """Notes the small values of a module at each checkpoint; ``changed`` has those that the fit changed.

    Args:
        module: of the fit, at its start.
        resumed: whether it continues an earlier run, whose values hold no longer.
    """

    def __init__(self, module: nn.Module, resumed: bool) -> None:
        self._module = module
        self._initial = {} if resumed else numbers_of(module)
        self._seen: dict[str, list[tuple[int, Any]]] = {}
        self._lost: set[str] = set()
        self._step = -1

    def note(self, step: int) -> None:
        """Note the present values, unless the step has been noted: hooks that come later prepare the next epoch."""
        if step == self._step:
            return
        self._step = step
        found = numbers_of(self._module)
        self._lost |= self._seen.keys() - found.keys()  # such as a list that has become long
        for path, value in found.items():
            entries = self._seen.setdefault(path, [])
            if not entries or not same(entries[-1][1], value):
                entries.append((step, value))

    @property
    def changed(self) -> dict[str, list[tuple[int, Any]]]:
        """The values of what has changed since the start of the fit."""
        return {
            path: entries
            for path, entries in self._seen.items()
            if path not in self._lost
            and (len(entries) > 1 or path not in self._initial or not same(entries[0][1], self._initial[path]))
        }


def numbers_of(module: nn.Module) -> dict[str, Any]:
    """The small values among a module's attributes and what they hold, by path; those of libraries' classes aside."""
    found = {}
    for prefix, mapping, names in _owners(module):
        for key in names:
            value = encoded(mapping[key])
            if value is not NOTHING:
                found[_path(prefix, mapping, key)] = value
    return found


def small_values(module: nn.Module) -> dict[str, Any]:
    """Small plain values, see ``numbers_of``, and short buffers of integers, which count and whose paths end in " "."""
    buffers = {
        f"{name} ": {"buffer": buffer.tolist()}
        for name, buffer in module.named_buffers()
        if not buffer.is_floating_point() and not buffer.is_complex() and buffer.numel() <= _ENTRIES
    }
    return numbers_of(module) | buffers


def put_back(module: nn.Module, history: History, step: int) -> None:
    """Give a module's values what they were at a checkpoint, or at the first one after it."""
    at = {
        path: next((value for at, value in reversed(entries) if at <= step), entries[0][1])
        for path, entries in history.items()
    }
    put(module, at)


def put(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Set values by path where a module has a small value, or a dict or object that may get it; see ``numbers_of``."""
    if not values:
        return
    owners = {prefix: mapping for prefix, mapping, _ in _owners(module)}
    for path, value in values.items():
        mapping, key = _place(owners, path)
        if mapping is None or (key not in mapping and isinstance(mapping, _Attributes)):
            continue
        now = mapping.get(key)
        if encoded(now) is not NOTHING:
            mapping[key] = _decoded(value, now)


def same(one: Any, other: Any) -> bool:
    """Whether two encoded values are equal, NaN to itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def encoded(value: Any) -> Any:
    """A small value as JSON; a marker for all others."""
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:
        return value if len(value) <= _ENTRIES else NOTHING
    if type(value) in (list, tuple) and len(value) <= _ENTRIES:
        plain = all(type(entry) in (bool, int, float) for entry in value)
        return {type(value).__name__: list(value)} if plain else NOTHING
    if type(value) is Tensor and value.layout is torch.strided and value.numel() <= _ENTRIES:
        fits = not (value.requires_grad or value.is_complex() or value.is_quantized or value.is_meta)
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")} if fits else NOTHING
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)):
        fits = value.dtype.kind in "biuf" and value.dtype.itemsize <= 8 and value.size <= _ENTRIES
        return {"numpy": value.tolist(), "dtype": value.dtype.name} if fits else NOTHING
    return NOTHING


def _decoded(value: Any, now: Any) -> Any:
    """The value that was encoded; a tensor is where the present one is."""
    if not isinstance(value, Mapping):
        return value
    if "tensor" in value:
        device = now.device if isinstance(now, Tensor) else None
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]), device=device)
    if "numpy" in value:
        import numpy

        return numpy.asarray(value["numpy"], dtype=value["dtype"])[()]
    return tuple(value["tuple"]) if "tuple" in value else list(value["list"])


def _owners(module: nn.Module) -> Iterator[tuple[str, MutableMapping[Any, Any], list[Any]]]:
    """Yield what may hold small values: path, mapping, and those of its keys that are the user's."""
    for name, part in module.named_modules():
        if type(part).__module__.partition(".")[0] in LIBRARIES:
            continue
        own, prefix = _Attributes(vars(part)), clean(name)
        kind: Any = type(part)
        names = [key for key in own if key not in _library_attributes(kind)]
        yield prefix, own, names
        held = [(key, own[key]) for key in names]
        if isinstance(own.get("_hparams"), dict):
            held.append(("hparams", own["_hparams"]))
        for key, value in held:
            yield from _inside(f"{prefix}.{key}" if prefix else key, value)


def _inside(path: str, value: Any, nested: bool = False) -> Iterator[tuple[str, MutableMapping[Any, Any], list[Any]]]:
    """Yield a dict, a dict in it, or a plain object with its dicts."""
    own: MutableMapping[Any, Any]
    if isinstance(value, dict):
        own = value
    elif not nested and is_plain_object(value):
        own = _Attributes(vars(value))
    else:
        return
    if len(own) <= _KEYS:
        names = [key for key in own if type(key) in (str, int)]
        yield path, own, names
        if not nested:
            for key in names:
                yield from _inside(_path(path, own, key), own[key], nested=True)


class _Attributes(UserDict[Any, Any]):
    """The attributes of an object, told apart from a dict's items."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.data = attributes


@lru_cache(1024)
def _library_attributes(kind: Any) -> frozenset[str]:
    """Names of the attributes that a module has from PyTorch or Lightning, such as ``training``."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in (*LIBRARIES, "torch") and issubclass(base, nn.Module):
            try:
                return frozenset(vars(base()))
            except TypeError:  # a layer with arguments, whose attributes are as good as the user's
                continue
    return frozenset()


def _path(prefix: str, mapping: Mapping[Any, Any], key: Any) -> str:
    if isinstance(mapping, _Attributes):
        return f"{prefix}.{key}" if prefix else key
    return f"{prefix}[{key!r}]"


def _place(owners: Mapping[str, MutableMapping[Any, Any]], path: str) -> tuple[MutableMapping[Any, Any] | None, Any]:
    """The mapping that a path is in, and its key there."""
    for prefix in sorted(owners, key=len, reverse=True):
        mapping, rest = owners[prefix], path[len(prefix) :]
        if not path.startswith(prefix):
            continue
        if isinstance(mapping, _Attributes):
            key = rest.removeprefix(".") if prefix else rest
            if key.isidentifier() and (not prefix or rest != key):
                return mapping, key
        elif rest[:1] == "[" and rest[-1:] == "]":
            with contextlib.suppress(ValueError, SyntaxError):
                return mapping, ast.literal_eval(rest[1:-1])
    return None, None
