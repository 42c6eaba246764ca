"""A module in float64 at slightly other weights, where rounding decides nothing: checks are repeated there."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_influence.module.in_double import LOW, InDouble, raised
from lightning_influence.module.precision import default_type
from lightning_influence.module.snapshot import ModuleSnapshot, restoring
from lightning_influence.module.task import Task, settle
from lightning_influence.types import Batch

Tolerance = tuple[float, float] | None
"""Of a comparison, relative to a parameter's and to the largest entry; None: that of the weights' dtype."""

# Shares of a loss differ by more than this.
_PRECISELY = (1e-6, 1e-9)
# Relative noise on the weights: what holds for a loss holds at any weights, but no two numbers tie there.
_NOISE = {torch.float64: 1e-6, torch.float32: 1e-3}
# What a module may raise that does not run in float64, as on devices that have none.
CANNOT = (Exception,)


def holds_precisely(task: Task, holds: Callable[[Task, Tolerance], bool]) -> bool:
    """Whether something that failed, perhaps by rounding, holds in float64 at slightly other weights.

    A module that does not run in float64 gets three trials at other weights in its own precision.

    Args:
        task: the module with its loss; it is restored afterwards.
        holds: what to repeat, with another task and the tolerance.
    """
    try:
        with precise(task, torch.float64) as other:
            return holds(other, _PRECISELY)
    except CANNOT:
        for seed in range(3):
            with precise(task, None, seed) as other:
                if holds(other, None):
                    return True
        return False


@contextlib.contextmanager
def precise(task: Task, dtype: torch.dtype | None, seed: int | None = 0) -> Iterator[Task]:
    """The same loss with the module's weights, buffers and batches in ``dtype``, and noise on its weights.

    Args:
        task: the module with its loss.
        dtype: float64; None: that of each tensor.
        seed: of the noise; None: there is none, and the weights are copies.
    """
    module = task.module
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    draw = torch.Generator().manual_seed(seed or 0)
    noise = _NOISE[torch.float64 if dtype is torch.float64 else torch.float32]
    task.settle()
    with contextlib.ExitStack() as stack:
        stack.enter_context(restoring(tensors, "data"))
        stack.callback(settle, module)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*single contiguous chunk.*")
        for tensor in tensors:
            value = tensor.detach().to(dtype or tensor.dtype, copy=True)
            if isinstance(tensor, nn.Parameter) and seed is not None:
                value *= 1 + noise * torch.rand(value.shape, generator=draw).to(value)
            tensor.data = value
        for part in module.modules() if dtype is torch.float64 else ():
            for name, value in list(part.__dict__.items()):  # plain tensors among its attributes
                if isinstance(value, Tensor) and value.dtype in LOW:
                    stack.callback(part.__dict__.update, {name: value})
                    part.__dict__[name] = value.detach().double()
        yield _PreciseTask.of(task, dtype)


class _PreciseTask(Task):
    """A task whose module is in float64 at present."""

    inner: Task
    dtype: torch.dtype | None

    @classmethod
    def of(cls, task: Task, dtype: torch.dtype | None) -> "_PreciseTask":
        other = cls.__new__(cls)
        other.__dict__.update(task.__dict__)
        other.inner, other.dtype, other.on_forward = task, dtype, None
        if dtype is not None:
            other.precision = replace(task.precision.full, needed=False).full
        other._snapshot = [ModuleSnapshot(task.module)]
        return other

    def to_device(self, batch: Batch) -> Batch:
        """The batch as the task moves it, in float64."""
        batch = self.inner.to_device(batch)
        return batch if self.dtype is None else tree_map(raised, batch)

    def __call__(self, batch: Batch) -> Tensor:
        """The loss on a batch; numbers that the step itself makes in float32 are float64, too."""
        if self.dtype is None:
            return super().__call__(batch)
        with default_type(torch.float64), InDouble():
            return super().__call__(batch)
