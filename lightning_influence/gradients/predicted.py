"""What a model predicts for the examples of a batch, read from the call of a loss function."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.data.examples import Block
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.task import Task
from lightning_influence.module.torch_functions import Args, Function, FunctionWatch, Kwargs
from lightning_influence.types import labels_in

# Log-probabilities of the classes, from the first argument of a loss function.
_CLASSES: Mapping[Any, Callable[[Tensor], Tensor]] = {
    F.cross_entropy: lambda x: x.log_softmax(1),
    F.nll_loss: lambda x: x,
}
_TWO = {F.binary_cross_entropy_with_logits: torch.sigmoid, F.binary_cross_entropy: lambda x: x}
_NUMBERS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)


class Predicted(NamedTuple):
    """Of a batch: classes or numbers, [example]; with classes, their probabilities and whether they are the targets."""

    values: Tensor
    probabilities: Tensor | None = None
    right: Tensor | None = None


def predictions_of(task: Task, block: Block) -> Predicted | None:
    """The predictions for a block at the present weights; None where the loss does not tell.

    It tells if it calls one of torch's losses of classes, with as many rows as examples; or, without any, one of
    numbers. Two calls with different inputs leave open which is meant.
    """
    watch = _LossWatch()
    seed_for(block.start)
    with torch.no_grad(), watch:
        task(task.to_device(block.batch))
    labels = labels_in(block.batch)
    for calls in (watch.of_classes, watch.of_numbers):
        if not calls:
            continue
        func, given, target = calls[0]
        one = all(call[1] is given for call in calls)
        return _read(func, given.cpu().double(), target, labels, block.size) if one else None
    return None


def _read(func: Any, given: Tensor, target: Any, labels: Any, size: int) -> Predicted | None:
    if given.ndim == 2 and given.shape[1] == 1 and func not in _CLASSES:
        given = given[:, 0]
    if len(given) != size or given.ndim != (2 if func in _CLASSES else 1) or not isinstance(target, Tensor):
        return None
    if func in _NUMBERS:
        return Predicted(given) if target.numel() == size else None
    if func in _TWO:
        one = _TWO[func](given)
        logs = torch.stack([1 - one, one], 1).log()
    else:
        logs = _CLASSES[func](given)
    best = logs.max(1)
    if target.numel() != size:  # probabilities of the classes
        return Predicted(best.indices, best.values.exp())
    asked = target.detach().cpu().reshape(size)
    if isinstance(labels, Tensor) and labels.numel() == size and not torch.equal(labels.cpu().reshape(size), asked):
        return None  # a loss beside the main one
    return Predicted(best.indices, best.values.exp(), best.indices == asked)


class _LossWatch(FunctionWatch):
    """While active, keeps what torch's loss functions were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.of_classes: list[tuple[Any, Tensor, Any]] = []
        self.of_numbers: list[tuple[Any, Tensor, Any]] = []

    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run and follow a call."""
        calls = self.of_classes if func in _CLASSES or func in _TWO else self.of_numbers if func in _NUMBERS else None
        given = args[0] if args else kwargs.get("input")
        if calls is not None and isinstance(given, Tensor):
            calls.append((func, given, args[1] if len(args) > 1 else kwargs.get("target")))
        return func(*args, **kwargs)
