"""Full float32 precision and plain eager operations while a module is scored."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lightning_influence.devices import kinds_in_use


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32, compiled code, and the fused attention path that hides the layers inside from the tape."""
    precision, fast = torch.get_float32_matmul_precision(), torch.backends.mha.get_fastpath_enabled()
    cudnn = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.mha.set_fastpath_enabled(False)
    eager = torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else None
    try:
        with eager if eager is not None else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.backends.mha.set_fastpath_enabled(fast)


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


@contextlib.contextmanager
def plain_checkpointing() -> Iterator[None]:
    """Make activation checkpointing keep its activations: recomputed layers would not be recorded."""
    from torch.utils import checkpoint

    def reentrant(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return run(*args)

    class Keep(contextlib.nullcontext):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()

    own = checkpoint.CheckpointFunction.__dict__.get("apply")
    hook = getattr(checkpoint, "_checkpoint_hook", None)
    setattr(checkpoint.CheckpointFunction, "apply", staticmethod(reentrant))  # noqa: B010
    setattr(checkpoint, "_checkpoint_hook", Keep)  # noqa: B010
    try:
        yield
    finally:
        for owner, name, old in ((checkpoint.CheckpointFunction, "apply", own), (checkpoint, "_checkpoint_hook", hook)):
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
