"""Operations in float64 whose operands are in lower precisions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_influence.devices import has_float64
from lightning_influence.module.torch_functions import Args, Function, FunctionWatch, Kwargs, writes

LOW = (torch.float32, torch.float16, torch.bfloat16)
_CPU = torch.device("cpu")
_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}


class InDouble(FunctionWatch):
    """While active, functions get float64 in place of lower precisions, among them those that are named in a cast."""

    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """See ``in_double``."""
        return in_double(func, args, kwargs)


def in_double(func: Function, args: Args, kwargs: Kwargs, operand: Callable[[Any], Any] | None = None) -> Any:
    """Call a function of torch with its operands in float64, on the CPU if their device has none.

    Args:
        func: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        operand: gives a tensor in float64; None: ``raised``.
    """
    operand = operand or raised
    if args and isinstance(args[0], Tensor) and _is_cast(func, args, kwargs):
        value = operand(args[0])
        output = value.double()
        return output.clone() if output is value and not _is_itself(func, args[0]) else output
    kept = 1 if writes(func) else 0
    args = (*args[:kept], *tree_map(operand, tuple(args[kept:])))
    return func(*args, **{name: value if name == "out" else tree_map(operand, value) for name, value in kwargs.items()})


def _is_cast(func: Function, args: Args, kwargs: Kwargs) -> bool:
    """Whether a function of a tensor makes it one of floats."""
    name = getattr(func, "__name__", "")
    named = (*args[1:], *kwargs.values())
    return name in _CASTS or (name in ("to", "type") and any(value is torch.float64 for value in named))


def _is_itself(func: Function, value: Tensor) -> bool:
    """Whether a cast of a tensor, which may stand for one of float32, would return the tensor itself."""
    own = torch.float32 if value.dtype is torch.float64 else value.dtype
    return own is _CASTS.get(func.__name__)


def raised(value: Any) -> Any:
    """A tensor, or a dtype, of low precision as float64; anything else as it is."""
    if isinstance(value, Tensor):
        if not has_float64(value.device):
            value = value.to(_CPU)
        return value.double() if value.dtype in LOW and value.layout is torch.strided else value
    return torch.float64 if value in LOW and isinstance(value, torch.dtype) else value


def lowered(value: Any) -> Any:
    """A tensor of float64 as float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.float64 else value
