"""Reads of a Trainer by a user's code: who reads, the paths of what is read, and values as JSON."""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.types import LIBRARIES

_NOT_USERS = LIBRARIES | (sys.stdlib_module_names - {"__main__"})
# The most numbers that a recorded value may have.
_MOST = 4096
# The most items of a container that holds objects.
_FEW = 16

Record = tuple[tuple[int, Mapping[str, Any]], ...]
"""(optimizer steps so far, values by path) in the order of the steps, one entry for each time that a value changed."""


@dataclass(frozen=True)
class FitValues:
    """What a fit recorded of its Trainer.

    Args:
        record: values by steps; empty where nothing was recorded.
        exact: optimizer steps at which values were recorded: those of checkpoints.
        given: whether a user passed the Trainer that is at hand.
    """

    record: Record = ()
    exact: frozenset[int] = frozenset()
    given: bool = False


class NotPlain(TypeError):
    """A value that is not made of numbers, text and small tensors."""


def is_users(frame: FrameType) -> bool:
    """Whether a frame runs a user's code, not Lightning's, PyTorch's or Python's."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _NOT_USERS


def as_json(value: Any, strict: bool = True) -> Any:
    """A value as JSON.

    Args:
        value: it.
        strict: raise for objects; otherwise they are described by their class.

    Raises:
        NotPlain: it is, or holds, an object other than numbers, text and small tensors.
    """
    if value is None or (isinstance(value, (bool, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, Enum):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and _is_small(value):
        plain = value.detach().cpu().to(torch.float64 if value.is_floating_point() else value.dtype)
        return {"is": "tensor", "value": plain.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if type(value).__module__ == "numpy" and getattr(getattr(value, "dtype", None), "kind", "") in tuple("biuf"):
        if value.size <= _MOST:
            return {"is": "numpy", "value": value.tolist(), "dtype": str(value.dtype)}
    elif isinstance(value, (list, tuple, dict)) and len(value) <= _MOST:
        try:
            return _container(value, True)
        except NotPlain:
            if not strict and len(value) <= _FEW:
                return _container(value, False)
    if strict:
        raise NotPlain
    return {"is": "object", "value": f"{type(value).__module__}:{type(value).__qualname__}"}


def _container(value: Any, strict: bool) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"is": "dict", "value": [[as_json(key), as_json(item, strict)] for key, item in value.items()]}
    return {"is": "tuple" if isinstance(value, tuple) else "list", "value": [as_json(item, strict) for item in value]}


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= _MOST and not tensor.is_complex() and tensor.layout is torch.strided


def from_json(value: Any, device: torch.device, path: str, make: Callable[[str, str], Any]) -> Any:
    """The value that ``as_json`` was given.

    Args:
        value: what it returned.
        device: of tensors.
        path: of the value.
        make: takes the place of an object, by its path and the name of its class.
    """
    if not isinstance(value, dict):
        return value
    kind, content = value["is"], value["value"]
    if kind == "object":
        return make(path, content)
    if kind == "tensor":
        return torch.tensor(content, dtype=getattr(torch, value["dtype"]), device=device)
    if kind == "numpy":
        numpy = import_module("numpy")
        return numpy.array(content, value["dtype"])[()]
    if kind == "dict":
        return {key: from_json(item, device, f"{path}[{key!r}]", make) for key, item in content}
    items = [from_json(item, device, f"{path}[{i}]", make) for i, item in enumerate(content)]
    return tuple(items) if kind == "tuple" else items


def class_named(name: str) -> type | None:
    """The class of that name, if its module has been imported."""
    module, _, path = name.partition(":")
    try:
        found = functools.reduce(getattr, path.split("."), sys.modules[module])
    except (KeyError, AttributeError):
        return None
    return found if isinstance(found, type) else None


def watched_class(kind: Any, attribute: Callable[[Any, str], Any], others: Mapping[str, Any]) -> type:
    """A subclass whose attributes, where a user's code reads them, are given by ``attribute(object, name)``.

    Args:
        kind: the class.
        attribute: gives the value; it may read it from the object.
        others: further methods of the subclass.
    """

    def read(self: Any, name: str) -> Any:
        if name.startswith("__") or not is_users(sys._getframe(1)):
            return kind.__getattribute__(self, name)
        return attribute(self, name)

    def reduced(self: Any, protocol: Any) -> Any:
        found = kind.__reduce_ex__(self, protocol)
        if not isinstance(found, tuple):
            return found
        arguments = tuple(kind if argument is type(self) else argument for argument in found[1])
        return (kind if found[0] is type(self) else found[0], arguments, *found[2:])

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "__slots__": ()}
    own = {"__getattribute__": read, "__reduce_ex__": reduced}
    made: type = type(kind)(kind.__name__, (kind,), {**names, **own, **others})
    return made


def own_value(owner: Any, name: str, kind: Any) -> Any:
    """An attribute as its class gives it."""
    try:
        return kind.__getattribute__(owner, name)
    except AttributeError:
        fallback = getattr(kind, "__getattr__", None)
        if fallback is None:
            raise
        return fallback(owner, name)


def set_class(owner: Any, kind: type) -> None:
    """Change an object's class, whatever its class does when attributes are set."""
    object.__setattr__(owner, "__class__", kind)


def is_of_the_process(kind: type, name: str) -> bool:
    """Whether an attribute of a Trainer is about the process, the device, the stage or the loggers of the present.

    That is: a property that reads the Trainer's strategy, state or loggers, and none of its loops. What the strategy
    holds for a fit is not.
    """
    getter = getattr(getattr(kind, name, None), "fget", None)
    if getter is None:
        return name in _LIKE_IN_ANY_FIT
    reads = set(getter.__code__.co_names)
    return bool(reads & _PROCESS) and not reads & _LOOPS and name not in _OF_THE_FIT


_PROCESS = {"strategy", "state", "loggers", "_loggers", "precision_plugin", "device_ids", "_signal_connector"}
_LOOPS = {"fit_loop", "validate_loop", "test_loop", "predict_loop"}
_OF_THE_FIT = {"optimizers", "lr_scheduler_configs"}
_LIKE_IN_ANY_FIT = {"state", "profiler", "should_stop", "fast_dev_run"}  # a `fast_dev_run` leaves no checkpoint
