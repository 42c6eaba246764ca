"""A digest of what a module computes besides its weights: the code that its step reaches, the values that it reads.

It follows names: functions are reached whose names occur in code that is, and so are attributes of users' objects.
What it cannot see through raises `Unclear`, such as a step that reads its Trainer, files or the clock.
"""

import enum
import functools
import hashlib
import logging
import re
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.util import resolve_name
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.module.code_libraries import (
    Unclear,
    attributes_of,
    extends_library,
    is_hidden,
    is_library,
    is_library_function,
    patches,
    version,
)
from lightning_influence.module.code_reading import imports_in, names_in, written
from lightning_influence.module.torch_functions import words

# What reads more than its arguments, or names that no code spells.
_DOUBTFUL = words("open eval exec globals locals vars input compile trainer _trainer fabric dir")
# Attributes that Lightning gives a module, and that say nothing about what it computes.
_ASIDE = words("_trainer _fabric log log_dict print prepare_data_per_node")
# Methods of a class that nothing calls but its name.
_MAKING = words("__init__ __new__ __post_init__")
_OF_ALL = words("__dict__ __weakref__ __doc__ __module__ __annotations__ __abstractmethods__")
_DYNAMIC = words("getattr hasattr attrgetter methodcaller __dict__ __getattribute__")
_ENTERED = words(
    "training_step forward _call_impl on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer"
)
_ENTRIES = 2**22  # of a tensor or array that is no parameter
_OBJECTS = 20_000
_GIVING = ("member_descriptor", "_tuplegetter")  # what is in an object
_VALUES = (int, float, complex, str, bytes)
_PLAIN_TYPES = (bool, *_VALUES, type(None), type(Ellipsis), range, slice)
_TORCH_TYPES = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_CACHED: Any = type(functools.cache(len))
EVERYTHING = ("getattr",)
"""Names with which all attributes are reached."""


def digest(*values: Any, names: Iterable[str] = _ENTERED, saved: Iterable[Tensor] = ()) -> str:
    """The digest of a module and of other objects that its loss depends on, such as ``loss=``.

    Args:
        values: modules, functions, data.
        names: where code is entered.
        saved: tensors whose values are those of a checkpoint.

    Raises:
        Unclear: the loss may depend on more.
    """
    reached, of_checkpoint = set(names), {id(tensor) for tensor in saved}
    values = *values, list(patches())
    while True:  # until no object shows further names
        walk = _Walk(reached, of_checkpoint)
        for value in values:
            walk.add(value)
        if walk.found <= reached:
            return walk.hash.hexdigest()
        reached |= walk.found


class _Walk:
    """One walk through objects.

    Args:
        names: of the functions and attributes that are reached.
        saved: the ids of tensors whose values are those of a checkpoint.
    """

    def __init__(self, names: Iterable[str], saved: Iterable[int] = ()) -> None:
        self.names, self.found, self.saved = frozenset(names), set[str](), frozenset(saved)
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
        numpy = sys.modules.get("numpy")
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
            self._add_array(value)
        elif isinstance(value, (list, tuple, Mapping)):
            self._feed(_label(type(value)), len(value))
            self._add_all(chain.from_iterable(value.items()) if isinstance(value, Mapping) else value)
            self.add(value.default_factory if isinstance(value, defaultdict) else None)
            self._add_own(value)
        elif (plain := _plain(value)) is not None:
            self._feed(_label(type(value)), plain)
            self._add_own(value)
        else:
            self._add_coded(value)

    def _add_coded(self, value: Any) -> None:
        if isinstance(value, ModuleType):
            self._add_names_of(value, self.names, set())
        elif isinstance(value, type):
            self._add_class(value, made=True)
        elif isinstance(value, FunctionType):
            self._add_function(value)
        elif isinstance(value, nn.Module):
            self._add_module(value)
        elif (parts := _parts(value)) is not None:
            self._add_all(parts)
        elif is_hidden(type(value)):
            self._add_builtin(value)
        else:
            self._add_type(type(value))
            self._add_attributes(attributes_of(value), extends_library(type(value)))

    def _add_all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.add(value)

    def _add_own(self, value: Any) -> None:
        """The class of a user's value of a plain kind, and the attributes that it was given."""
        users = not is_library(type(value).__module__)
        if users:
            self._add_type(type(value))
        if users or getattr(value, "__dict__", None):
            self._add_attributes(attributes_of(value), isinstance(value, enum.Enum) or extends_library(type(value)))

    def _add_type(self, cls: type) -> None:
        """The class of an object, of which no code need make another."""
        key = -id(cls)  # as a value, it may be called
        if key not in self._met:
            self._met[key] = len(self._met), cls
            self._add_class(cls, made=False)

    def _add_tensor(self, value: Tensor) -> None:
        self._feed(type(value).__name__, tuple(value.shape), value.dtype, value.requires_grad)
        self._add_own(value)
        if id(value) in self.saved:
            return
        if value.numel() > _ENTRIES or value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise Unclear("a large tensor")
        flat = value.detach().cpu().contiguous().view(-1)
        self.hash.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")

    def _add_array(self, value: Any) -> None:
        if value.dtype.hasobject or value.size > _ENTRIES:
            raise Unclear("a large array")
        self._feed("array", value.shape, str(value.dtype))
        self.hash.update(value.tobytes())
        self._add_own(value)

    def _add_builtin(self, value: Any) -> None:
        """A function in C, and what it is bound to."""
        if not callable(value) or not hasattr(value, "__name__"):
            raise Unclear(f"a {type(value).__qualname__}")
        owner = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", "")
        if not is_library(owner or "builtins"):
            raise Unclear(f"`{value.__name__}`, which is compiled")
        self._feed("builtin", _label(value), version(owner or "builtins"))
        bound = getattr(value, "__self__", None)
        if not isinstance(bound, (ModuleType, type)) and type(bound).__name__ != "PyCapsule":
            self.add(bound)

    # ---- code -----------------------------------------------------------------------------------------------------

    def _add_function(self, function: FunctionType) -> None:
        if is_library_function(function):
            self._feed("function", _label(function), version(function.__module__))
            self._add_closure(function)
            return
        names = frozenset(names_in(function.__code__))
        if doubtful := names & _DOUBTFUL:
            raise Unclear(f"`{sorted(doubtful)[0]}` in `{function.__qualname__}`")
        self.found |= names
        self._feed("function", _label(function), written(function.__code__))
        for part in (function.__defaults__, function.__kwdefaults__):
            self.add(part)
        self._add_attributes(vars(function), False)
        self._add_closure(function)
        for name in sorted(names & function.__globals__.keys()):
            self._add_named(name, function.__globals__[name], names, set())
        for name in sorted(imports_in(function.__code__)):
            self._add_import(name, function, names)

    def _add_closure(self, function: FunctionType) -> None:
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError as error:
                raise Unclear("an empty cell") from error
            self.add(content)

    def _add_import(self, name: str, function: FunctionType, names: frozenset[str]) -> None:
        try:
            name = resolve_name(name, function.__globals__.get("__package__"))
        except ImportError as error:
            raise Unclear(f"an import of `{name}`") from error
        for imported in {name.partition(".")[0]: 0, name: 0}:
            if imported not in sys.modules:
                raise Unclear(f"an import of `{imported}`")
            self._add_named(imported, sys.modules[imported], names, set())

    def _add_named(self, name: str, value: Any, names: frozenset[str], met: set[int]) -> None:
        """What a name stands for; of a module what it has of some names."""
        self._feed(name)
        if not isinstance(value, ModuleType):
            self.add(value)
        elif id(value) not in met:
            self._add_names_of(value, names, met)

    def _add_names_of(self, module: ModuleType, names: frozenset[str], met: set[int]) -> None:
        """What a module, and the modules in it, have of some names."""
        if type(module).__name__ in ("_Ops", "_OpNamespace"):
            raise Unclear("`torch.ops`")
        self._feed(module.__name__, version(module.__name__))
        met.add(id(module))
        for name in sorted(names & vars(module).keys()):
            self._add_named(name, vars(module)[name], names, met)

    def _add_class(self, cls: type, made: bool) -> None:
        """A class; ``made``: code may make an object of it."""
        extends = extends_library(cls)
        if not is_library(type(cls).__module__):
            self._add_type(type(cls))
        for base in cls.__mro__:
            library = is_library(base.__module__)
            self._feed("class", _label(base), version(base.__module__) if library else "")
            own = {n: v for n, v in vars(base).items() if n not in _OF_ALL}
            if library:  # what somebody else has put into it
                own = {n: v for n, v in own.items() if isinstance(v, FunctionType) and not is_library(v.__module__)}
            for name in sorted(own):
                making = made or base.__name__ in self.names
                if making if name in _MAKING else (extends or self._is_reached(name)):
                    self._feed(name)
                    self.add(own[name])

    # ---- objects --------------------------------------------------------------------------------------------------

    def _add_module(self, module: nn.Module) -> None:
        compiled = any(getattr(module, name, None) for name in ("_compiler_ctx", "_compiled_call_impl"))
        if compiled or type(module).__module__.startswith(("torch.jit", "torch._dynamo")):
            raise Unclear("compiled code")
        self._add_type(type(module))
        aside = _ASIDE if "_trainer" in vars(module) else ()
        values = {name: value for name, value in vars(module).items() if name not in aside and name != "training"}
        for name in [n for n in values if "_hooks" in n or n in ("_parameters", "_buffers", "_modules")]:
            held = values.pop(name)
            self._feed(name)  # the keys of hooks are numbers that count all modules' hooks
            self.add(list(held.values()) if "_hooks" in name and isinstance(held, Mapping) else held)
        if type(module).__module__.startswith("torchmetrics"):
            values = {name: value for name, value in values.items() if type(value) in _PLAIN_TYPES}
        self._add_attributes(values, extends_library(type(module)))

    def _add_attributes(self, values: Mapping[str, Any], every: bool) -> None:
        for name in sorted(values):
            if every or self._is_reached(name):
                self._feed(name)
                self.add(values[name])


def _plain(value: Any) -> Any:
    """What sets of plain values, members of an ``Enum``, patterns, kinds of numbers and text hold; None: others."""
    if isinstance(value, (set, frozenset)) and all(type(item) in _PLAIN_TYPES for item in value):
        return sorted(map(repr, value))
    if isinstance(value, re.Pattern):
        return value.pattern, value.flags
    if isinstance(value, enum.Enum):
        return value.name
    return next((kind.__repr__(value) for kind in _VALUES if isinstance(value, kind)), None)


def _parts(value: Any) -> list[Any] | None:
    """What a bound method, a property or another wrapper of functions holds; None for others."""
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, _CACHED):
        return [value.__wrapped__]
    if isinstance(value, logging.Logger) or type(value).__name__ in _GIVING:
        return []
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (property, classmethod, staticmethod, functools.cached_property)):
        return [getattr(value, name, None) for name in ("fget", "__func__", "func")]
    return None


def _label(value: Any) -> str:
    owner = getattr(value, "__objclass__", value)
    return f"{getattr(owner, '__module__', None)}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"
