"""Functions of PyTorch as modes see them: by their names, and with their operands."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_WRITING_OPERATORS = frozenset(
    f"__{name}__" for name in "setitem set iadd isub imul itruediv ifloordiv imod ipow iand ior ixor".split()
)


def functions_named(*names: str, owners: Sequence[Any] = (torch, Tensor)) -> frozenset[Any]:
    """The functions of these names that the owners have in this version of PyTorch."""
    return frozenset(getattr(owner, name) for name in names for owner in owners if hasattr(owner, name))


def operands_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments of a call, and what is in those that are lists or tuples."""
    for operand in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(operand, (list, tuple)):
            yield from operand
        else:
            yield operand


def writes(func: Callable[..., Any]) -> bool:
    """Whether a function writes into its first operand."""
    name = getattr(func, "__name__", "")
    return name in _WRITING_OPERATORS or (name.endswith("_") and not name.endswith("__"))
