"""Follows rows that a forward pass takes by index out of others, such as the tokens that go to an expert."""

from collections.abc import Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from lightning_influence.gradients.layout import Taken
from lightning_influence.gradients.rules import RULES
from lightning_influence.module.torch_functions import Args, Function, Kwargs, functions_named


class TakenRows:
    """Which activations hold rows that were taken by index, and which rows; it follows every call of a pass.

    Rows are followed through functions that leave each in its place. Whether each is of the example that it is taken
    to be of is left to the checks of the gradients.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Tensor], Taken]] = {}

    def of(self, operands: Iterator[Any], rows: int) -> Taken | None:
        """The rows of an operation's output with so many, from its operands."""
        if not self._known:
            return None
        for operand in operands:
            taken = self._of(operand)
            if taken is not None and len(taken.index) == rows and operand.shape[:1] == (rows,):
                return taken
        return None

    def _of(self, operand: Any) -> Taken | None:
        tensor, taken = self._known.get(id(operand), (None, None))
        return taken if tensor is not None and tensor() is operand else None

    def follow(self, func: Function, args: Args, kwargs: Kwargs, output: Any) -> None:
        """Note what a function returned, if it took rows, or left taken rows in their places."""
        if func in _TAKES:
            taken = self._taken(*args, **kwargs) if func is Tensor.__getitem__ else self._selected(*args, **kwargs)
            if taken is not None:
                self._known[id(output)] = ref(output), taken
        elif self._known and (func in _PARTS or func in _IN_PLACE):
            self._pass(args, output)

    def _pass(self, args: Args, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output
        if not isinstance(tensors, (list, tuple)) or not all(isinstance(t, Tensor) and t.ndim for t in tensors):
            return
        if (taken := next(filter(None, map(self._of, args)), None)) is None:
            return
        start, total, divided = 0, len(taken.index), sum(map(len, tensors))
        for tensor in tensors:
            if len(tensor) == total:
                self._known[id(tensor)] = ref(tensor), taken
            elif divided == total:
                self._known[id(tensor)] = ref(tensor), taken[start : start + len(tensor)]
            start += len(tensor)

    def _taken(self, of: Tensor, index: Any) -> Taken | None:
        """The rows of ``of[index]``."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if first is None and rest and of.ndim:  # a dimension of one before the rows, which a reshape will remove
            return self._taken(of, tuple(rest))
        if any(i is not Ellipsis and not (isinstance(i, slice) and i == slice(None)) for i in rest):
            return None
        before = self._of(of)
        if isinstance(first, slice):
            return None if before is None else before[first]
        if not isinstance(first, Tensor) or not first.ndim:
            return None
        if first.dtype is torch.bool:
            return self._selected(
                of.flatten(0, first.ndim - 1) if first.ndim > 1 else of, 0, first.flatten().nonzero()[:, 0]
            )
        return self._selected(of, 0, first)

    def _selected(self, input: Tensor, dim: int, index: Tensor) -> Taken | None:
        """The rows of ``input.index_select(dim, index)``."""
        if dim != 0 or index.ndim != 1 or index.is_floating_point() or not input.ndim or index.dtype is torch.uint8:
            return None
        before, index = self._of(input), index.detach().to(input.device, torch.int64)
        return Taken(index % len(input), len(input)) if before is None else before[index]


_OWNERS = (torch, Tensor, torch.nn.functional)
_TAKES = frozenset({Tensor.__getitem__, torch.index_select, Tensor.index_select})
_PARTS = functions_named("split chunk tensor_split unbind split_with_sizes", _OWNERS)
_IN_PLACE = frozenset(RULES) | functions_named(
    "relu relu_ relu6 silu gelu elu selu celu leaky_relu tanh sigmoid softplus mish hardswish hardtanh glu softmax "
    "dropout logsigmoid softsign prelu rrelu pow square sqrt rsqrt exp log abs neg clamp masked_fill where erf sin "
    "clone contiguous to type_as float double half bfloat16 detach view reshape flatten unflatten squeeze unsqueeze "
    "multiply divide subtract mul_ add_ sub_ div_ __pow__ __neg__ __rsub__ __imul__ __iadd__",
    _OWNERS,
)
