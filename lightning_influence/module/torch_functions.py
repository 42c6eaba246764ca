"""Functions of PyTorch as modes see them: by their names, and with their operands."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]
Args = Sequence[Any]
Kwargs = Mapping[str, Any]


class FunctionWatch(TorchFunctionMode):
    """While active, every call of one of torch's functions goes through ``called``, which makes it."""

    def __torch_function__(self, func: Function, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        return self.called(func, args, kwargs or {})

    @abstractmethod
    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run ``func``, perhaps with other operands, and return what it gives."""


def words(text: str) -> frozenset[str]:
    """The words of a text, such as names of functions."""
    return frozenset(text.split())


_WRITING = words("__setitem__ __set__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__")
_WRITING |= words("__iand__ __ior__ __ixor__")


def functions_named(names: str, owners: Sequence[Any] = (torch, Tensor)) -> frozenset[Any]:
    """The functions of these names that the owners have in this version of PyTorch."""
    return frozenset(getattr(owner, name) for name in words(names) for owner in owners if hasattr(owner, name))


def operands_of(args: Args, kwargs: Kwargs) -> Iterator[Any]:
    """The arguments of a call, and what is in those that are lists or tuples."""
    for operand in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(operand, (list, tuple)):
            yield from operand
        else:
            yield operand


def writes(func: Function) -> bool:
    """Whether a function writes into its first operand."""
    name = getattr(func, "__name__", "")
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))
