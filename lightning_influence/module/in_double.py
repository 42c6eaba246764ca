"""Operations in float64 whose operands are in lower precisions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_influence.devices import has_float64

LOW = (torch.float32, torch.float16, torch.bfloat16)
_CPU = torch.device("cpu")


class InDouble(TorchFunctionMode):
    """While active, functions get float64 in place of lower precisions, among them those that are named in a cast."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return in_double(func, args, kwargs or {})


def in_double(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    operand: Callable[[Any], Any] | None = None,
) -> Any:
    """Call a function of torch with its operands in float64, on the CPU if their device has none.

    Args:
        func: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        operand: gives a tensor in float64; None: ``raised``.
    """
    operand = operand or raised
    name = getattr(func, "__name__", "")
    inside = name.startswith(("__i", "__set")) if name.startswith("__") else name.endswith("_")
    kept = 1 if inside else 0  # what is written into
    if name in ("float", "half", "bfloat16") and args and isinstance(args[0], Tensor):
        return operand(args[0])
    args = (*args[:kept], *tree_map(operand, tuple(args[kept:])))
    return func(*args, **tree_map(operand, dict(kwargs)))


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
