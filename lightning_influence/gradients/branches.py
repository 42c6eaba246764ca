"""Which way a pass took: digests of what it called, by which blocks that go another way are found."""

from collections.abc import Iterable
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from lightning_influence.module.torch_functions import functions_named

Branch = tuple[int, int]
"""Digests of the functions that a pass called with the parameters it gave them, and of these with their numbers."""

# Functions whose whole numbers are no sizes or positions.
_ARITHMETIC = functions_named(
    "add sub mul div pow clamp where full tensor lerp masked_fill", (torch,)
) | functions_named(
    "add sub mul div pow clamp where masked_fill add_ sub_ mul_ div_ lerp __add__ __sub__ __mul__ __truediv__ __pow__ "
    "__rpow__ __getitem__ true_divide rsub __radd__ __rsub__ __rmul__ __rtruediv__",
    (Tensor,),
)


class PassBranch:
    """Digests what a pass calls; two that branch otherwise have other digests.

    Args:
        examples: how many the batch has; numbers that are as large tell nothing.
    """

    def __init__(self, examples: int) -> None:
        self.value: Branch = (0, 0)
        self._examples = examples

    def add(self, called: Any, operands: Iterable[Any] = (), parameters: Iterable[str] = ()) -> None:
        """Add a call with its operands and the parameters among them; reading an attribute is none."""
        if _reads(called):
            return
        calls, numbers = self.value
        kinds = (float, bool, str, int) if called in _ARITHMETIC else (float, bool, str)
        name = f"{getattr(called, '__qualname__', called)} {' '.join(parameters)} "  # the same in a later process
        given = [n for n in operands if type(n) in kinds and not self._is_size(n)]
        self.value = crc32(name.encode(), calls), crc32(f"{name}{given}".encode(), numbers)

    def returned(self, called: Any, output: Any) -> None:
        """Add what a call returned, if it is a truth value."""
        if isinstance(output, bool) and not _reads(called):
            self.add(output)

    def _is_size(self, number: Any) -> bool:
        """Whether a number is the size of the batch or one through it."""
        return type(number) is not str and (number == self._examples or abs(number * self._examples - 1) < 1e-9)


def _reads(called: Any) -> bool:
    """Whether a call reads an attribute, as our own code and PyTorch's do now and then."""
    return getattr(called, "__name__", "") == "__get__"
