"""Whether the part of a loss that is computed in float64 leaves the gradients as they are, on two examples."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.gradients.precise import CANNOT, precise
from lightning_influence.module.snapshot import holding
from lightning_influence.module.task import Task
from lightning_influence.numerics.subsets import evenly_spread

_TRIED = 2
_DIFFERS = 1e-2  # relative to the norm; float32 alone may lose all digits, so both are compared with float64


def check_tail(task: Task, examples: Examples, names: Sequence[str]) -> bool:
    """Compute a task's loss in its own precision throughout, if that is nearer to float64; whether this was so.

    Nothing is compared where no part of the loss is computed in float64, or the module does not run in it.

    Args:
        task: of whose loss a part may be computed in float64.
        examples: a few are tried.
        names: of the parameters.
    """
    if not task.tail.is_used:
        return False
    for example in evenly_spread(len(examples), _TRIED):
        try:
            with precise(task, torch.float64, None) as other, holding([other], "exact", False):
                truth = _gradient(other, examples, example, names)
        except CANNOT:
            continue
        found = _error(_gradient(task, examples, example, names), truth)
        if found > _DIFFERS:
            with holding([task], "exact", False):
                plain = _error(_gradient(task, examples, example, names), truth)
            if plain < found:
                task.tail = replace(task.tail, layers=math.inf)
                return True
    return False


def _gradient(task: Task, examples: Examples, example: int, names: Sequence[str]) -> Tensor:
    """The gradient of an example's loss, in float64 on the CPU."""
    parameters = [task.named_parameters()[name] for name in names]
    parameters = [p for p in parameters if p.requires_grad]
    with torch.enable_grad():
        loss = task(task.to_device(examples.one(example))).sum()
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([g.detach().flatten().cpu().double() for g in found])


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float32).tiny))
