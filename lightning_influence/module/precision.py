"""Full float32 precision while a module is scored."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lightning_influence.devices import kinds_in_use


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """Disable TF32: products of float32 matrices have the digits of float32."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Keep ``torch.autocast`` off, also where the module enters it: scores are computed in the weights' own type."""
    cls = torch.amp.autocast_mode.autocast
    enter = cls.__enter__

    def off(self: Any) -> Any:
        enabled, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = enabled

    devices = [device for device in ("cpu", *kinds_in_use()) if torch.is_autocast_enabled(device)]
    setattr(cls, "__enter__", off)  # noqa: B010
    for device in devices:  # of the caller's own
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        setattr(cls, "__enter__", enter)  # noqa: B010
        for device in devices:
            torch.set_autocast_enabled(device, True)
