"""Whether the loss in training mode is another one than in eval mode, in which examples are scored."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_influence.data.examples import Examples
from lightning_influence.gradients import Engine, Sample
from lightning_influence.gradients.general import loss_and_gradient, requiring_gradients
from lightning_influence.gradients.precise import precise
from lightning_influence.module.mode_reads import has_known_modes
from lightning_influence.module.random_state import random_states, seed_for
from lightning_influence.module.snapshot import restoring
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.types import clean
from lightning_influence.wording import counted

_SAMPLED = 8


def note_on_training(engine: Engine, sample: Sample, frozen: Collection[str] = ()) -> str | None:
    """Compare gradients of a few examples in both modes; layers of torch stay in eval mode.

    Args:
        engine: at the last checkpoint's weights, which are in place again afterwards.
        sample: of the training dataset, at these weights.
        frozen: names of submodules that were in eval mode during the fit.

    Returns:
        A note if they differ, and neither drew random numbers.
    """
    examples = sample.examples
    if engine.task.loss is not None or not sample.reads_mode or _same(engine, sample, frozen):
        return None
    with contextlib.suppress(Exception), precise(engine.task, None) as task:  # or it does not run in training mode
        other = replace(engine, task=task)
        scored = _gradient(other, examples)
        with _in_training(task.module, frozen):
            trained = _gradient(other, examples)
        if scored is None or trained is None:
            return None
        scale = float(max(scored.norm(), trained.norm()))
        distance = float((scored - trained).norm())
        if distance > _tolerance(scored.dtype) * scale:
            return (
                "The loss in training mode differs from that in eval mode, in which examples are scored, although no "
                "random number is drawn (`self.training`): gradients of "
                f"{counted(min(_SAMPLED, len(examples)), 'example')} by {distance / scale:.0%}. Scores are about the "
                "latter. For those of the former, pass it as `loss=`, a callable (module, batch) -> [batch] of "
                "per-sample losses."
            )
    return None


def _same(engine: Engine, sample: Sample, frozen: Collection[str]) -> bool:
    """Whether one pass in training mode has the gradient of the sum of its examples' losses in eval mode."""
    ids, task = sample.chosen[-1], engine.task
    singles = [sample.alone(i).gradient for i in ids]
    names = [name for name in engine.plan.names if name not in engine.plan.unreached]
    with contextlib.suppress(Exception), precise(task, None, seed=None) as other, _in_training(other.module, frozen):
        batch = sample.examples.some(ids)
        trained = sample.digester.of(loss_and_gradient(other, batch, names, ids[0])[1])
        scored = [one.flat(names) for one in singles if one is not None and one.is_finite]
        factor = engine.reduction.factor(len(ids), engine.weights_of(ids))
        shares = engine.weights_of(ids)
        total = sum(g * (1.0 if shares is None else float(shares[i])) for i, g in enumerate(scored))
        difference = trained.flat(names) * factor - total
        dtype = next(iter(trained.values.values())).dtype
        return len(scored) == len(ids) and bool(
            difference.norm() <= _tolerance(dtype) * trained.flat(names).norm() * factor
        )
    return False


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-8 if dtype is torch.float64 else 1e-4


def _gradient(engine: Engine, examples: Examples) -> Tensor | None:
    """The gradient of the summed loss of a few examples; None if random numbers were drawn."""
    block = examples.chosen(evenly_spread(len(examples), _SAMPLED))
    names = [name for name in engine.plan.names if name not in engine.plan.unreached]
    parameters = list(engine.task.named_parameters(names).values())
    seed_for(block.start)
    before = random_states()
    with requiring_gradients(engine.task.module, names):
        loss = engine.task(engine.task.to_device(block.batch))
        total = engine.reduction.total(loss, block.size, engine.weights_of(block.ids))
        found = torch.autograd.grad(total, parameters, materialize_grads=True)
    return None if before != random_states() else torch.cat([g.to_dense().flatten() for g in found])


@contextlib.contextmanager
def _in_training(module: nn.Module, frozen: Collection[str]) -> Iterator[None]:
    """Training mode for what a user wrote: layers of torch, dropout and normalisation differ in known ways."""
    with restoring(module.modules(), "training"):
        for name, part in module.named_modules():
            part.training = not has_known_modes(part) and clean(name) not in frozen
        yield
