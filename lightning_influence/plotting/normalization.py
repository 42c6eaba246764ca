"""The mean and standard deviation that a dataset normalises its images with, where they can be found."""

from collections.abc import Iterator, Mapping
from dis import get_instructions
from inspect import getclosurevars
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import torch

Normalization: TypeAlias = tuple[Any, Any]
"""Mean and standard deviation that an image was normalised with: numbers, or one per channel."""

_DEEP = 5  # transforms within transforms, datasets within datasets
_OF_LABELS = {"y", "target", "targets", "label", "labels", "output", "outputs"}  # words in the names of other numbers
_PAIRS = tuple((mean, std) for mean in ("mean", "mu") for std in ("std", "stddev", "stdev", "sigma"))


def normalization_of(dataset: Any) -> Normalization | None:
    """Mean and standard deviation of a dataset's images, or of the dataset under a `Subset`; None where none is found.

    Looked for: a `Normalize` among the transforms (torchvision, albumentations, Kornia), and numbers named mean and std
    among the attributes of the dataset and what its ``__getitem__`` reads.
    """
    for owner in inwards(dataset):
        attributes = _attributes(owner)
        reads = _read_by(getattr(type(owner), "__getitem__", None))
        for value in (*attributes.values(), *reads.values()):
            if (found := _of_transform(value)) is not None:
                return found
        if (found := _named(reads | attributes)) is not None:
            return found
    return None


def inwards(dataset: Any) -> Iterator[Any]:
    """The dataset, and those that it wraps."""
    for _ in range(_DEEP):
        yield dataset
        inner = getattr(dataset, "dataset", None)
        if inner is None:
            several = getattr(dataset, "datasets", None)
            inner = several[0] if isinstance(several, (list, tuple)) and several else None
        if inner is None:
            return
        dataset = inner


def _attributes(owner: Any) -> dict[str, Any]:
    """The attributes of an object and of its classes."""
    found: dict[str, Any] = {}
    for kind in reversed(type(owner).__mro__):
        found |= {name: value for name, value in vars(kind).items() if not name.startswith("__")}
    return found | getattr(owner, "__dict__", {})


def _of_transform(transform: Any, deep: int = _DEEP) -> Normalization | None:
    """Mean and standard deviation of a `Normalize`, or of the one among the steps of a transform."""
    if type(transform).__name__ == "Normalize":
        held = (
            transform.flags if isinstance(getattr(transform, "flags", None), Mapping) else _attributes(transform)
        )  # Kornia: flags
        return _numbers(held.get("mean"), held.get("std"))
    read = _read_by(transform) if isinstance(transform, (FunctionType, MethodType)) else {}
    steps = read or _steps(transform)
    for part in steps.values() if deep else ():
        if (found := _of_transform(part, deep - 1)) is not None:
            return found
    return _named(read)


def _steps(transform: Any) -> Mapping[Any, Any]:
    if isinstance(transform, Mapping):
        return transform
    within = transform if isinstance(transform, (list, tuple)) else getattr(transform, "transforms", None)
    if isinstance(transform, torch.nn.Sequential):
        within = list(transform)
    steps = dict(enumerate(within)) if isinstance(within, (list, tuple)) else {}
    return {**steps, "transform": getattr(transform, "transform", None)}


def _read_by(function: Any) -> dict[str, Any]:
    """What a function reads of its surroundings, by name."""
    try:
        read = getclosurevars(function)
    except (TypeError, ValueError):
        return {}
    return {**read.globals, **read.nonlocals, **_constants(function)}


def _constants(function: Any) -> dict[str, Any]:
    """Local variables of a function that it makes of a constant, such as ``mean = torch.tensor([0.5, 0.4, 0.3])``."""
    found: dict[str, Any] = {}
    last = None
    for step in get_instructions(function):
        if step.opname == "LOAD_CONST" and isinstance(step.argval, (tuple, float)):
            last = step.argval
        elif step.opname.startswith("STORE_FAST"):  # from 3.13 on also together with a second name
            if last is not None:
                found[step.argval[0] if isinstance(step.argval, tuple) else step.argval] = last
            last = None
    return found


def _named(values: Mapping[str, Any]) -> Normalization | None:
    """Numbers whose names differ in mean and std only, such as ``MEAN`` and ``STD``."""
    lower = {name.lower().strip("_"): value for name, value in values.items()}
    lower = {name: value for name, value in lower.items() if not _OF_LABELS & set(name.split("_"))}
    for name, mean in lower.items():
        for word, other in _PAIRS:
            if word in name and (std := lower.get(name.replace(word, other))) is not None:
                found = _numbers(mean, std)
                if found is not None:
                    return found
    return None


def _numbers(mean: Any, std: Any) -> Normalization | None:
    """The pair for values from 0 to 1, where it can be an image's: one number or one per channel."""
    try:
        parts = [torch.as_tensor(part, dtype=torch.float64).flatten() for part in (mean, std)]
    except (TypeError, ValueError, RuntimeError):
        return None
    if not all(part.numel() in (1, 3, 4) for part in parts) or not bool((parts[1] > 0).all()):
        return None
    if max(float(part.max()) for part in parts) > 1:  # for bytes, from 0 to 255
        parts = [part / 255 for part in parts]
    found_mean, found_std = (tuple(part.tolist()) for part in parts)
    return found_mean, found_std
