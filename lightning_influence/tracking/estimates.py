"""What a plain step takes and what an optimizer keeps, for plans made before the first step."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_influence.data.examples import Block
from lightning_influence.gradients.general import requiring_gradients
from lightning_influence.numerics.optimizers import UpdateInput, UpdateRule
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import timed


def states_of(rule: UpdateRule, options: Mapping[str, Any]) -> int:
    """How many tensors an optimizer keeps for each parameter of a group."""
    zero = torch.zeros(1)
    return len(rule.step(UpdateInput(zero, zero, {}, 0, options))[1])


def plain_seconds(session: Setting, sample: Block) -> float:
    """Of a forward and backward pass over a batch, without an optimizer: the faster of two."""
    task, names = session.task, list(session.engine.plan.names)

    def step() -> None:
        with requiring_gradients(task.module, names):
            total = task(task.to_device(sample.batch)).sum()
            torch.autograd.grad(total, [task.named_parameters()[name] for name in names], allow_unused=True)

    return timed(step)
