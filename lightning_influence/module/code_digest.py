"""A digest of what a module computes besides its weights: the code that its step reaches, the values that it reads.

It follows names: functions are reached whose names occur in code that is, and so are attributes of users' objects.
What it cannot see through raises `Unclear`, such as a step that reads its Trainer, files or the clock.
"""

import builtins
import enum
import functools
import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.module.code_reading import imports_in, names_in, written
from lightning_influence.types import LIBRARIES

# What reads more than its arguments, or names that no code spells.
_DOUBTFUL = frozenset(
    {"open", "eval", "exec", "globals", "locals", "vars", "input", "compile", "trainer", "_trainer", "fabric", "dir"}
)
# Of Python's own modules, those whose functions depend on their arguments alone, or on random states.
_PLAIN = frozenset(
    {
        *("abc", "builtins", "cmath", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "math"),
        *("itertools", "logging", "numbers", "operator", "random", "re", "statistics", "string", "types", "typing"),
        *("warnings", "__future__", "_operator", "_functools", "_collections", "_collections_abc"),
    }
)
_RELEASED = LIBRARIES | {
    *("numpy", "scipy", "torchvision", "torchaudio", "transformers", "tokenizers", "timm", "einops", "peft"),
    *("accelerate", "diffusers", "safetensors", "torch_geometric", "jaxtyping"),
}
# Whose base classes call what `_ENTERED` names.
_CALLERS = frozenset({"pytorch_lightning", "lightning", "lightning_fabric", "builtins", "abc", "typing"})
# Attributes that Lightning and torch give a module, and that say nothing about what it computes.
_ASIDE = frozenset({"_trainer", "_fabric", "training", "log", "log_dict", "print", "prepare_data_per_node"})
# Methods of a class that nothing calls but its name.
_MAKING = frozenset({"__init__", "__new__", "__post_init__"})
_ENTRIES = 2**22  # of a tensor or array that is no parameter
_OBJECTS = 20_000
_PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice)
_TORCH_TYPES = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_OF_ALL = frozenset({"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__"})


class Unclear(ValueError):
    """Something may change what a module computes, and cannot be seen."""


_DYNAMIC = frozenset({"getattr", "hasattr", "attrgetter", "methodcaller", "__dict__", "__getattribute__"})
_ENTERED = (
    *("training_step", "forward", "_call_impl"),
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
)
EVERYTHING = ("getattr",)
"""Names with which all attributes are reached."""


def digest(*values: Any, names: Iterable[str] = _ENTERED) -> str:
    """The digest of a module and of other objects that its loss depends on, such as ``loss=``.

    Args:
        values: modules, functions, data.
        names: where code is entered.

    Raises:
        Unclear: the loss may depend on more.
    """
    reached = set(names)
    while True:  # until no object shows further names
        walk = _Walk(reached)
        for value in values:
            walk.add(value)
        if walk.found <= reached:
            return walk.hash.hexdigest()
        reached |= walk.found


class _Walk:
    """One walk through objects.

    Args:
        names: of the functions and attributes that are reached.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names, self.found = frozenset(names), set[str]()
        self.everything = not self.names.isdisjoint(_DYNAMIC)
        self.hash = hashlib.sha256()
        self._met: dict[int, tuple[int, Any]] = {}

    def _feed(self, *values: Any) -> None:
        self.hash.update(repr(values).encode())

    def _is_reached(self, name: str) -> bool:
        """Whether code names an attribute, or the property that gives it: ``hparams`` gives ``_hparams``."""
        special = name.startswith("__") and name.endswith("__")
        return self.everything or special or not self.names.isdisjoint((name, name.lstrip("_")))

    def add(self, value: Any) -> None:
        """Add a value of any kind."""
        if isinstance(value, _TORCH_TYPES) or type(value) in _PLAIN_TYPES:
            self._feed(type(value).__name__, value)
            return
        if id(value) in self._met:
            self._feed("again", self._met[id(value)][0])
            return
        self._met[id(value)] = len(self._met), value
        if len(self._met) > _OBJECTS:
            raise Unclear("too many objects")
        self._add_object(value)

    def _add_object(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, (list, tuple, Mapping)):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            self._feed(_label(type(value)), len(value))
            for pair in pairs:
                for part in pair:
                    self.add(part)
        elif (plain := _plain(value)) is not None:
            self._feed(_label(type(value)), plain)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, FunctionType):
            self._add_function(value)
        elif isinstance(value, nn.Module):
            self._add_module(value)
        elif (parts := _parts(value)) is not None:
            for part in parts:
                self.add(part)
        elif isinstance(value, BuiltinFunctionType) or not hasattr(value, "__dict__"):
            self._add_foreign(value)
        else:
            self.add(type(value))
            self._add_attributes(vars(value), _extends_library(type(value)))

    def _add_tensor(self, value: Tensor) -> None:
        if isinstance(value, nn.Parameter):  # its values are those of a checkpoint
            self._feed("parameter", tuple(value.shape), value.dtype, value.requires_grad)
            return
        if value.numel() > _ENTRIES or value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise Unclear("a large tensor")
        flat = value.detach().cpu().contiguous().view(-1)
        self._feed("tensor", tuple(value.shape), value.dtype)
        self.hash.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")

    def _add_foreign(self, value: Any) -> None:
        """A function in C, an array, or an object without attributes."""
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
            if value.dtype.hasobject or value.size > _ENTRIES:
                raise Unclear("a large array")
            self._feed("array", value.shape, str(value.dtype))
            self.hash.update(value.tobytes())
        elif callable(value) and hasattr(value, "__name__") and not isinstance(value, MethodType):
            owner = getattr(value, "__module__", None) or getattr(
                getattr(value, "__objclass__", None), "__module__", ""
            )
            self._feed("builtin", _label(value), _version(owner or "builtins"))
        else:
            raise Unclear(f"a {type(value).__qualname__}")

    # ---- code -----------------------------------------------------------------------------------------------------

    def _add_function(self, function: FunctionType) -> None:
        if _is_library(function.__module__):
            self._feed("function", _label(function), _version(function.__module__))
            return
        names = set(names_in(function.__code__))
        if doubtful := names & _DOUBTFUL:
            raise Unclear(f"`{sorted(doubtful)[0]}` in `{function.__qualname__}`")
        self.found |= names
        self._feed("function", _label(function), written(function.__code__))
        for part in (function.__defaults__, function.__kwdefaults__):
            self.add(part)
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError as error:
                raise Unclear("an empty cell") from error
        for name in sorted(names & function.__globals__.keys()):
            self._add_global(name, function.__globals__[name], names)
        for name in sorted(imports_in(function.__code__)):
            if name not in sys.modules:
                raise Unclear(f"an import of `{name}`")
            self._add_global(name, sys.modules[name], names)

    def _add_global(self, name: str, value: Any, names: Iterable[str]) -> None:
        self._feed("global", name)
        self.add(value)
        if isinstance(value, ModuleType):
            for inner in sorted(set(names) & vars(value).keys()):
                self._feed(inner)
                self.add(vars(value)[inner])

    def _add_class(self, cls: type) -> None:
        extends = _extends_library(cls)
        for base in cls.__mro__:
            library = _is_library(base.__module__)
            self._feed("class", _label(base), _version(base.__module__) if library else "")
            own = {n: v for n, v in vars(base).items() if n not in _OF_ALL}
            if library:  # what somebody else has put into it
                own = {n: v for n, v in own.items() if isinstance(v, FunctionType) and not _is_library(v.__module__)}
            for name in sorted(own):
                made = name in _MAKING and base.__name__ in self.names
                if made or (name not in _MAKING and (extends or self._is_reached(name))):
                    self._feed(name)
                    self.add(own[name])

    # ---- objects --------------------------------------------------------------------------------------------------

    def _add_module(self, module: nn.Module) -> None:
        if getattr(module, "_compiler_ctx", None) or getattr(module, "_compiled_call_impl", None):
            raise Unclear("compiled code")
        if type(module).__module__.startswith(("torch.jit", "torch._dynamo")):
            raise Unclear("compiled code")
        self.add(type(module))
        values = {name: value for name, value in vars(module).items() if name not in _ASIDE and name != "_buffers"}
        for name, buffer in module._buffers.items():  # its values are those of a checkpoint
            self._feed("buffer", name, None if buffer is None else (tuple(buffer.shape), buffer.dtype))
        for name in ("_parameters", "_modules"):
            self.add(dict(values.pop(name)))
        hooks = {name: values.pop(name) for name in list(values) if "_hooks" in name}
        for name, hook in hooks.items():
            self._feed(name)
            self.add(list(hook.values()) if isinstance(hook, Mapping) else hook)
        if type(module).__module__.startswith("torchmetrics"):
            values = {name: value for name, value in values.items() if type(value) in _PLAIN_TYPES}
        self._add_attributes(values, _extends_library(type(module)))

    def _add_attributes(self, values: Mapping[str, Any], every: bool) -> None:
        for name in sorted(values):
            if every or self._is_reached(name):
                self._feed(name)
                self.add(values[name])


def _plain(value: Any) -> Any:
    """What sets of plain values, members of an ``Enum`` and patterns hold, or Python's modules are; None for others."""
    if isinstance(value, ModuleType):
        return value.__name__, _version(value.__name__)
    if isinstance(value, (set, frozenset)) and all(type(item) in _PLAIN_TYPES for item in value):
        return sorted(map(repr, value))
    if isinstance(value, re.Pattern):
        return value.pattern, value.flags
    return value.name if isinstance(value, enum.Enum) else None


def _parts(value: Any) -> list[Any] | None:
    """What a bound method, a property or another wrapper of functions holds; None for others."""
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (property, classmethod, staticmethod, functools.cached_property)):
        return [getattr(value, name, None) for name in ("fget", "__func__", "func")]
    return None


def _label(value: Any) -> str:
    owner = getattr(value, "__objclass__", value)
    return f"{getattr(owner, '__module__', None)}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


@functools.cache
def _is_library(name: str | None) -> bool:
    """Whether a module of this name is Python's, or of a package that changes with its version only."""
    top = str(name).partition(".")[0]
    if top == __name__.partition(".")[0] or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    released = file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
    return released and top in _RELEASED


def _extends_library(cls: type) -> bool:
    """Whether code of a library may call any method and read any attribute of objects of a class."""
    return any(
        _is_library(base.__module__) and base is not nn.Module and base.__module__.partition(".")[0] not in _CALLERS
        for base in cls.__mro__
    )


@functools.cache
def _version(name: str) -> str:
    """The version of an installed package.

    Raises:
        Unclear: it is none, or one of Python's own modules that read more than their arguments.
    """
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        if top in _PLAIN or top == builtins.__name__:
            return sys.version
        raise Unclear(f"`{name}`")
    if not _is_library(name):
        return ""
    found = getattr(sys.modules.get(top), "__version__", None)
    if not isinstance(found, str):
        try:
            found = importlib.metadata.version(top)
        except importlib.metadata.PackageNotFoundError as error:
            raise Unclear(f"the version of `{top}`") from error
    return found
