"""Which fits cannot be tracked; checked before the first step where possible, otherwise at a batch or step."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_influence.gradients import Engine, Reduction
from lightning_influence.gradients.reduction import match_loss, refuse_batch_statistics, refuse_mixing
from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.module.task import Task
from lightning_influence.numerics.clipping import ByNorm, ByValue, Clipping
from lightning_influence.tracking.errors import Untrackable
from lightning_influence.tracking.tracker import WeightUpdate
from lightning_influence.types import Batch, clean

_INSTEAD = "Use `TracInCP()`, which needs checkpoints only."


def refuse(trainer: Any, module: Any, engine: Engine, differentiates: bool) -> None:
    """Check the Trainer and the module, and the selected parameters if the tracker differentiates the steps.

    Raises:
        Untrackable: anything but one process and one optimizer, in automatic optimization without mixed precision.
        ValueError: some of the trained parameters are not selected.
    """
    reason = None
    if trainer.world_size > 1:
        reason = f"one process, got {trainer.world_size}"
    elif not module.automatic_optimization:
        reason = "automatic optimization, got manual optimization"
    elif len(trainer.optimizers) != 1:
        reason = f"one optimizer, got {len(trainer.optimizers)}"
    elif "mixed" in str(getattr(trainer.precision_plugin, "precision", "")):
        reason = f"one precision for weights and gradients, got {trainer.precision_plugin.precision!r}"
    elif type(module).configure_gradient_clipping.__module__.split(".")[0] not in ("pytorch_lightning", "lightning"):
        reason = "gradients clipped by `Trainer(gradient_clip_val=)`, got the module's `configure_gradient_clipping`"
    if reason is not None:
        raise Untrackable(f"Expected {reason}: other fits cannot be tracked. {_INSTEAD}")
    if differentiates:
        engine.plan.check_has(trained(module))


def trained(module: Any) -> frozenset[str]:
    """Names of the parameters that are not frozen."""
    return frozenset(clean(name) for name, parameter in module.named_parameters() if parameter.requires_grad)


def changed(before: frozenset[str], now: frozenset[str]) -> str | None:
    """Why tracking ends when parameters were frozen or unfrozen during the fit; None if none was."""
    if before == now:
        return None
    names = sorted(before ^ now)
    return (
        f"Expected the same parameters to be trained from the start to the end of the fit, got `{names[0]}`"
        f"{f' and {len(names) - 1} more' if len(names) > 1 else ''} "
        f"{'unfrozen' if names[0] in now else 'frozen'} during the fit. Use `HyDRA()` after the fit, which supports it."
    )


def clipping_of(trainer: Any) -> Clipping | None:
    """How Lightning clips gradients; None if it does not."""
    limit, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    if not limit:
        return None
    name = str(getattr(algorithm, "value", algorithm) or "norm")
    return ByValue(float(limit)) if name == "value" else ByNorm(float(limit))


def takes_mean(task: Task, batch: Batch) -> bool:
    """Whether the step takes the mean of ``loss=``, or the sum.

    Raises:
        ValueError: neither.
    """
    with torch.no_grad():
        with isolated_random_state():
            losses = task(batch)
        with isolated_random_state():
            value = float(task.of_step()(batch))
    return match_loss(losses, value)


def refuse_mixed(task: Task, ids: Sequence[int], batch: Batch, engine: Engine) -> None:
    """Check on one batch that examples do not change one another's loss in training.

    Raises:
        ValueError: they do.
    """
    refuse_batch_statistics(task.module)
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if len(ids) == 1 or not all(leaf.ndim > 0 and len(leaf) == len(ids) for leaf in leaves):
        return
    before = torch.get_rng_state()
    with torch.no_grad(), isolated_random_state():
        joint = float(task(batch))
        if not torch.equal(torch.get_rng_state(), before):  # one example alone would use other random numbers
            return
        singles = [float(task(tree_map_only(Tensor, itemgetter(slice(i, i + 1)), batch))) for i in range(len(ids))]
    refuse_mixing(singles, joint, engine.reduction is not Reduction.SUM, engine.weights_of(ids))


def verify_step(update: WeightUpdate, parameters: Mapping[str, Tensor]) -> None:
    """Check that the update rule predicts the step that the optimizer made.

    Raises:
        Untrackable: it does not.
    """
    for name, at in update.inputs.items():
        expected, _ = update.rule.step(at)
        size = (expected - at.weight).abs().max() + 1e3 * torch.finfo(expected.dtype).eps * expected.abs().max()
        if not bool((expected - parameters[name]).abs().max() <= _tolerance(expected) * size):
            raise Untrackable(
                f"`{name}` was not updated as its optimizer does: something else changed weights or gradients (a hook "
                f"or a callback). {_INSTEAD}"
            )


def verify_gradients(update: WeightUpdate, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that the step's gradients are those of the loss on its micro-batches.

    Raises:
        Untrackable: they are not.
    """
    largest = torch.stack([gradient.abs().max() for gradient in update.raw.values()]).max()
    for name, gradient in update.raw.items():
        expected = torch.stack([found[name] for found in batches]).sum(0)
        if not bool((expected - gradient).abs().max() <= _tolerance(gradient) * largest):
            raise Untrackable(
                f"the gradient of `{name}` was not that of the loss on its batch: something else changes it, uses "
                "random numbers or modifies the batch before the step (a hook, or a callback after `Influence`; list "
                f"it before). {_INSTEAD}"
            )


def _tolerance(like: Tensor) -> float:
    return 1e-6 if like.dtype is torch.float64 else 1e-2
