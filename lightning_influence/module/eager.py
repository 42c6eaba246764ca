"""Plain eager operations while a module is scored: nothing compiled, fused or computed again hides its layers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Disable compiled code, and the fused attention path that hides the layers inside from the tape."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    eager = torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else None
    try:
        with eager if eager is not None else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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
