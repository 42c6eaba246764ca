"""Buffers through which the weights before a step change the losses after it, beside the step of the optimizer."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_influence.module.snapshot import holding, restoring
from lightning_influence.module.task import Task
from lightning_influence.types import clean

# How far tensors are moved to see what depends on them, relative to their largest entry.
_WEIGHTS_BY, _BUFFERS_BY = 0.01, 0.1
# Differences of more units in the last place than this are more than rounding.
_ROUNDING = 50
# So many steps that write into buffers are looked at in a row, then those at powers of two.
_IN_A_ROW = 16


def is_due(count: int) -> bool:
    """Whether to look at the step of this number, from 1, among those that may write into buffers."""
    return count <= _IN_A_ROW or count & (count - 1) == 0


def candidates(task: Task) -> list[str]:
    """Names of the floating-point buffers other than the running statistics of normalisation layers."""
    owners = running_statistics(task.module)
    buffers = task.named_buffers()
    return [n for n, b in buffers.items() if b.is_floating_point() and n.rpartition(".")[0] not in owners]


def running_statistics(module: nn.Module) -> list[str]:
    """Names of the normalisation layers that keep running statistics, which are read in eval mode only."""
    parts = module.named_modules()
    return [clean(name) for name, part in parts if isinstance(part, _NormBase) and part.running_mean is not None]


def carrying(
    task: Task, names: Collection[str], trained: Iterable[str], loss: Callable[[], Tensor]
) -> tuple[set[str], str | None]:
    """Looks for a buffer that ``training_step`` writes with what depends on the weights, and that a loss reads.

    Costs one pass where the pass writes into none of the buffers, else two and two for each link of the path.

    Args:
        task: in the modes of the fit, with the weights and buffers before a step.
        names: of the buffers that may be written.
        trained: names of the parameters that the step moves.
        loss: the loss of a batch, with the same random numbers each time.

    Returns:
        The buffers that the pass wrote into; and the name of one through which the weights reach a loss, or None.
    """
    buffers = {name: buffer for name, buffer in task.named_buffers().items() if name in names}
    before = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    value, written = _passed(task, loss, names)
    found = {name for name in before if _differ(written[name], before[name])}
    if not found:
        return found, None
    with _nudged(task.named_parameters(trained).values(), _WEIGHTS_BY):
        _, other = _passed(task, loss, found)
    carried: set[str] = {name for name in found if _differ(other[name], written[name])}
    evaluated: Tensor | None = None
    looked: set[str] = set()
    while carried - looked:
        looked = set(carried)
        moved = [buffers[name] for name in sorted(carried)]
        with _nudged(moved, _BUFFERS_BY):
            nudged, other = _passed(task, loss, found)
        with evaluating(task):
            if evaluated is None:
                evaluated, _ = _passed(task, loss, ())
            with _nudged(moved, _BUFFERS_BY):
                evaluated_nudged, _ = _passed(task, loss, ())
        if _differ(nudged, value) or _differ(evaluated_nudged, evaluated):
            return found, next((name for name in sorted(carried) if read_by(task, name, loss)), sorted(carried)[0])
        carried |= {name for name in found if _differ(other[name], written[name])}
    return found, None


def read_by(task: Task, name: str, loss: Callable[[], Tensor]) -> bool:
    """Whether a loss depends on a buffer, in the modes that the module is in or in eval mode."""
    buffer = task.named_buffers()[name]
    for mode in (contextlib.nullcontext, evaluating):
        with mode(task):
            value, _ = _passed(task, loss, ())
            with _nudged([buffer], _BUFFERS_BY):
                nudged, _ = _passed(task, loss, ())
        if _differ(nudged, value):
            return True
    return False


def refusal(name: str) -> str:
    """Why there are no derivatives of a fit with such a buffer, and what to do."""
    return (
        f"Expected weights that change later losses through the optimizer's steps alone, got `{name}`, a buffer that "
        "`training_step` writes with what depends on the weights and that the loss reads: no derivative of a "
        "replay follows it. Use `TracInCP()` or an influence function, which take it as it was, or `Refit`."
    )


@contextlib.contextmanager
def evaluating(task: Task) -> Iterator[None]:
    """Puts the module into eval mode, and back into the modes that it was in."""
    with contextlib.ExitStack() as stack:
        stack.callback(task.remember)
        stack.enter_context(restoring(task.module.modules(), "training"))
        stack.callback(task.settle)
        task.settle()
        task.module.eval()
        task.remember()
        yield


def _passed(task: Task, loss: Callable[[], Tensor], names: Collection[str]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The loss, and the buffers as the pass left them."""
    written: dict[str, Tensor] = {}

    def note() -> None:
        written.update({name: b.detach().clone() for name, b in task.named_buffers().items() if name in names})

    try:
        with holding([task], "on_forward", note):
            return loss().detach().clone(), written
    finally:
        task.settle()


@contextlib.contextmanager
def _nudged(tensors: Iterable[Tensor], by: float) -> Iterator[None]:
    """Moves the entries of tensors by different amounts; in memory, which the module's snapshot does not see."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        for tensor, value in kept:
            waves = torch.arange(value.numel(), device=value.device).cos().view(value.shape).to(value)
            size = value.abs().max() if value.numel() else value.sum()
            tensor.data.add_(waves * torch.where(size > 0, size, torch.ones_like(size)) * by)
        yield
    finally:
        for tensor, value in kept:
            tensor.data.copy_(value)


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by more than rounding, or one of them is not finite."""
    if one.shape != other.shape:
        return True
    scale = torch.maximum(one.abs(), other.abs()).max() if one.numel() else 0.0
    near = (one - other).abs() <= _ROUNDING * torch.finfo(one.dtype).eps * scale
    return not bool((near | (one == other) | (one.isnan() & other.isnan())).all())
