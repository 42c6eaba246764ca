"""Gradients as a function of the index of a batch (``batch_idx``): those of a few examples, and plans for all."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.gradients.general import requiring_gradients
from lightning_influence.gradients.hessian import gradient_of
from lightning_influence.gradients.layout import Layout
from lightning_influence.gradients.plan import Plan
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.step import NoLoss
from lightning_influence.module.task import Task
from lightning_influence.numerics.subsets import evenly_spread

# Examples in the batch whose gradient is compared, spread over the dataset.
_COMPARED = 5


def gradient_at(
    task: Task, examples: Examples, names: Sequence[str], put: Callable[[Any], AbstractContextManager[None]]
) -> Callable[[Any], dict[str, Tensor] | None]:
    """A function of a number: the gradient of a batch's loss at the current weights, by name.

    The loss itself, under the name "", where no parameter is named or reached; None where ``training_step`` returns
    none.

    Args:
        task: the module.
        examples: of the batch.
        names: of the parameters.
        put: puts the number where the loss may read it, such as ``task.at`` the index of the batch.
    """
    ids = evenly_spread(len(examples), _COMPARED)

    def run(number: Any) -> dict[str, Tensor] | None:
        parameters = task.named_parameters(names)
        with put(number), requiring_gradients(task.module, names):
            batch = task.to_device(examples.some(ids))
            seed_for(ids[0])
            try:
                loss = task(batch).sum()
            except NoLoss:
                return None
            found = gradient_of(loss, parameters) if parameters else {}
            return {n: g.to_dense() for n, g in found.items()} or {"": loss.detach()}

    return run


def joined(one: Plan, other: Plan) -> Plan:
    """A plan for a loss that is checked at two indices: what differs between their plans goes one example at a time."""
    layouts, vectorised, one_by_one, unreached = {}, [], [], []
    for name in one.names:
        ways = {way for way in (_way(one, name), _way(other, name)) if way is not None}
        if not ways:
            unreached.append(name)
        elif ways == {"vectorised"}:
            vectorised.append(name)
        elif len(ways) == 1 and isinstance(layout := next(iter(ways)), Layout):
            layouts[name] = layout
        else:
            one_by_one.append(name)
    return Plan(
        layouts,
        tuple(vectorised),
        tuple(one_by_one),
        one.separate | other.separate,
        one.copy_leaves or other.copy_leaves,
        one.uses | other.uses,
        tuple(unreached),
        branches=one.branches | other.branches,
        mixing=one.mixing or other.mixing,
        reads=one.reads or other.reads,
        mixed_before=one.mixed_before or other.mixed_before,
        closely=one.closely or other.closely,
    )


def _way(plan: Plan, name: str) -> Layout | str | None:
    """How a parameter's gradients are computed; None where the loss does not reach it."""
    if name in plan.layouts:
        return plan.layouts[name]
    return "vectorised" if name in plan.vectorised else "one by one" if name in plan.one_by_one else None
