"""Functions of PyTorch as modes see them: by their names, and with their operands."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


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
