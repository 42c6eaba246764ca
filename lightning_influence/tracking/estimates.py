"""Time of a plain step and size of the optimizer state, for estimates before the first step."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_influence.data.examples import Block
from lightning_influence.gradients.general import requiring_gradients
from lightning_influence.numerics.optimizers import UpdateInput, UpdateRule
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import timed


def states_of(rule: UpdateRule, options: Mapping[str, Any]) -> int:
    """Number of tensors in the optimizer state per parameter of a group."""
    zero = torch.zeros(1)
    return len(rule.step(UpdateInput(zero, zero, {}, 0, options))[1])


def plain_seconds(setting: Setting, sample: Block) -> float:
    """Seconds for a forward and backward pass over a batch, without an optimizer step."""
    task, names = setting.task, list(setting.engine.plan.names)

    def step() -> None:
        with requiring_gradients(task.module, names):
            total = task(task.to_device(sample.batch)).sum()
            torch.autograd.grad(total, list(task.named_parameters(names).values()), allow_unused=True)

    return timed(step)
