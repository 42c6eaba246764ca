"""Whose code is whose: Python's, a package's that changes with its version only, or the user's; what objects show."""

import builtins
import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, MemberDescriptorType
from typing import Any

import torch
from torch.nn.modules import module as modules

from lightning_influence.module.torch_functions import words
from lightning_influence.types import LIBRARIES

# Of Python's own modules, those whose functions depend on their arguments alone, or on random states.
_PLAIN = words(
    "abc builtins cmath collections contextlib copy dataclasses enum functools math itertools logging numbers operator "
    "random re statistics string types typing warnings __future__ _warnings _operator _functools _collections "
    "_collections_abc"
)
_RELEASED = LIBRARIES | words(
    "numpy scipy torchvision torchaudio transformers tokenizers timm einops peft accelerate diffusers safetensors "
    "torch_geometric jaxtyping omegaconf typing_extensions"
)
# Whose base classes call what a step is entered by.
_CALLERS = words("pytorch_lightning lightning lightning_fabric builtins abc typing")


class Unclear(ValueError):
    """Something may change what a module computes, and cannot be seen."""


@functools.cache
def is_library(name: str | None) -> bool:
    """Whether a module of this name is Python's, or of a package that changes with its version only."""
    top = str(name).partition(".")[0]
    if top == __name__.partition(".")[0] or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    released = file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
    return released and top in _RELEASED


def is_library_function(function: FunctionType) -> bool:
    """Whether a library wrote a function; a decorator gives one's name to a user's, and a user's name to its own."""
    return is_library(function.__module__) and is_library(function.__globals__.get("__name__"))


def extends_library(cls: type) -> bool:
    """Whether code of a library may call any method and read any attribute of objects of a class."""
    return any(
        is_library(base.__module__)
        and base is not torch.nn.Module
        and base.__module__.partition(".")[0] not in _CALLERS
        for base in cls.__mro__
    )


@functools.cache
def version(name: str) -> str:
    """The version of an installed package.

    Raises:
        Unclear: it is none, or one of Python's own modules that read more than their arguments.
    """
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        if top in _PLAIN or top == builtins.__name__:
            return sys.version
        raise Unclear(f"`{name}`")
    if not is_library(name):
        return ""
    found = getattr(sys.modules.get(top), "__version__", None)
    if not isinstance(found, str):
        try:
            found = importlib.metadata.version(top)
        except importlib.metadata.PackageNotFoundError as error:
            raise Unclear(f"the version of `{top}`") from error
    return found


def patches() -> Iterator[Any]:
    """Functions of others that stand in for torch's, which its layers call, and hooks on all modules."""
    for owner in (torch, torch.nn.functional, torch.Tensor):
        for name, value in vars(owner).items():
            if isinstance(value, FunctionType) and not is_library_function(value):
                yield name, value
    for name, value in vars(modules).items():
        if name.startswith("_global_") and name.endswith("_hooks") and value:
            yield name, list(value.values())


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that an object was given, those in ``__slots__`` as well."""
    found = dict(vars(value)) if hasattr(value, "__dict__") else {}
    for base in type(value).__mro__:
        for name, slot in _slots(base).items():
            with contextlib.suppress(AttributeError):  # it has no value
                found.setdefault(name, slot.__get__(value))
    return found


def _slots(cls: type) -> dict[str, MemberDescriptorType]:
    own = vars(cls) if "__slots__" in vars(cls) else {}
    return {name: slot for name, slot in own.items() if isinstance(slot, MemberDescriptorType)}


def is_hidden(cls: type) -> bool:
    """Whether objects of a class hold more than attributes, as those of classes in C do."""
    offsets = cls.__dictoffset__, cls.__weakrefoffset__
    words = sum(offset > 0 for offset in offsets) + sum(len(_slots(base)) for base in cls.__mro__)
    return cls.__basicsize__ > object.__basicsize__ + words * tuple.__itemsize__
