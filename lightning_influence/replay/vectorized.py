"""Replays a captured fit under many weights of its examples at once, by ``torch.func.vmap`` over models."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_influence.devices import onto
from lightning_influence.gradients.general import NotVectorisable, without_metrics
from lightning_influence.module.replacing import replacing
from lightning_influence.module.trainer_state import set_clock
from lightning_influence.numerics.optimizers import OptimizerState
from lightning_influence.replay.forward import example_factors
from lightning_influence.replay.random_states import put_back
from lightning_influence.replay.replay import Replay
from lightning_influence.replay.steps import MicroBatch, Step
from lightning_influence.replay.training_state import TrainingState

# Bytes that the models of one vectorised run may take.
_BYTES = 2**29

Weights = Mapping[str, Tensor]
"""Parameters and buffers by name, [model, *shape]."""


def run_many(
    replay: Replay, weights: Tensor, renormalize: bool = False, done: Callable[[int], Any] = lambda models: None
) -> Weights:
    """The final weights and buffers of the captured fit under many weights of its examples.

    Models are trained side by side where ``training_step`` runs under ``torch.func.vmap`` and draws no random numbers
    for a batch as a whole, else one after another.

    Args:
        replay: the fit.
        weights: [model, train], of the examples' losses: 1 as in the fit, 0 left out.
        renormalize: divide a micro-batch's loss by the sum of its weights in place of its size.
        done: called with the number of models that were just finished; side by side, with their share of the steps.

    Returns:
        [model, *shape] by the name of a parameter or buffer, on the module's device.

    Raises:
        ValueError: ``weights`` of another shape; the examples of a batch change one another's loss.
    """
    if weights.ndim != 2 or weights.shape[1] != len(replay.examples):
        raise ValueError(
            f"Expected `weights` to be [model, train] with {len(replay.examples)} training examples, got "
            f"{list(weights.shape)}."
        )
    found: list[Weights] = []
    at_once = _models_at_once(replay)
    first = reported = 0

    def told(models: int) -> None:
        nonlocal reported
        done(models - reported)
        reported = models

    while first < len(weights):
        part, reported = weights[first : first + max(1, at_once)], 0
        try:
            if at_once == 0:
                raise NotVectorisable("The forward pass draws random numbers for a batch as a whole.")
            found.append(_vectorised(replay, part, renormalize, told))
        except NotVectorisable:
            at_once, part = 0, weights[first : first + 1]
            end = replay.run(part[0], renormalize)
            found.append({name: value[None] for name, value in {**end.weights, **end.buffers}.items()})
        first += len(part)
        told(len(part))
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _models_at_once(replay: Replay) -> int:
    """How many models fit into memory together; 0 where they cannot be trained side by side.

    Side by side, every step moves the same parameters.
    """
    forward, steps = replay.forward, replay.steps
    if not forward.joint and any(batch.random for step in steps for batch in step.batches):
        return 0
    if replay.engine.task.reads_index and not replay.steps_alike:
        return 0
    if (tokens := replay.engine.weights) is not None and bool((tokens == 0).any()):  # their own losses may be NaN
        return 0
    largest = max((len(batch.ids) for step in steps for batch in step.batches), default=1)
    like = next(iter(replay.engine.task.named_parameters().values()))
    activations = 4 * largest * replay.engine.width() * like.element_size()
    return max(1, _BYTES // (activations + 2 * replay.start().bytes()))


def _vectorised(replay: Replay, weights: Tensor, renormalize: bool, told: Callable[[int], Any]) -> Weights:
    """The models after all steps; after each one, `told` is called with how many finished ones it is worth so far."""
    task = replay.engine.task
    with replay.training():
        start = replay.start()
        start.put_into(task)
        if replay.steps:
            replay.forward.check(replay.steps[0], separate=True)
        start.put_into(task)
        task.on_forward = None
        tensors = start.weights, start.buffers, start.optimizer
        parameters, buffers, states = tree_map(lambda x: x.expand(len(weights), *x.shape).clone(), tensors)
        models = TrainingState(parameters, buffers, states, start.counts)
        weights = onto(weights, task.device)
        with without_metrics(task.module):
            for number, step in enumerate(replay.steps, 1):
                set_clock(task.module, step.made - 1, step.epoch)
                models = _step(replay, models, step, weights, renormalize)
                told(len(weights) * number // len(replay.steps))
    return {**models.weights, **models.buffers}


def _step(replay: Replay, models: TrainingState, step: Step, weights: Tensor, renormalize: bool) -> TrainingState:
    """The state of all models after a step, given that before it, both with tensors [model, *shape]."""
    names = [name for name in step.moves.options if name not in replay.engine.plan.unreached]
    forward = replay.forward
    factors = [
        example_factors(weights[:, list(batch.ids)], renormalize and forward.mean, forward.share(batch, step))
        for batch in step.batches
    ]
    losses = [_Losses(replay, batch) for batch in step.batches]

    def one(parameters: Weights, buffers: Weights, states: Mapping[str, OptimizerState], factors: list[Tensor]) -> Any:
        def total(moving: Weights) -> tuple[Tensor, Weights]:
            value, written = torch.zeros(()), buffers
            for of_batch, factor in zip(losses, factors, strict=True):
                each, written = of_batch({**parameters, **moving}, written)
                value = value + (each * factor.to(each)).sum()
            return value, written

        gradients, written = torch.func.grad(total, has_aux=True)({name: parameters[name] for name in names})
        after = TrainingState(parameters, buffers, states, models.counts).moved(step, gradients, written)
        return after.weights, after.buffers, after.optimizer

    try:
        before = models.weights, models.buffers, models.optimizer
        parameters, buffers, states = torch.func.vmap(one, randomness="same")(*before, factors)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise NotVectorisable(f"The step does not run under `torch.func.vmap`: {error}") from error
    made = {name: models.counts.get(name, 0) + 1 for name in names}
    return TrainingState(parameters, buffers, states, {**models.counts, **made})


class _Losses:
    """Losses of a micro-batch's examples as a function of parameters and buffers."""

    def __init__(self, replay: Replay, batch: MicroBatch) -> None:
        self._task, self._joint, self._batch = replay.engine.task, replay.forward.joint, batch
        self._on_device = replay.forward.read(batch)
        self._leaves, self._spec = tree_flatten(self._on_device)
        self._mapped = [isinstance(x, Tensor) and x.ndim > 0 and len(x) == len(batch.ids) for x in self._leaves]

    def __call__(self, parameters: Weights, buffers: Weights) -> tuple[Tensor, Weights]:
        """[example]; and the buffers after the forward pass."""
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        put_back(self._batch.random, self._task.device)
        with replacing(self._task.module, dict(parameters), own), self._task.at(self._batch.index):
            return (self._task(self._on_device) if self._joint else self._singles()), own

    def _singles(self) -> Tensor:
        if not all(m or not isinstance(x, Tensor) for m, x in zip(self._mapped, self._leaves, strict=True)):
            raise NotVectorisable("The batch holds tensors whose first dimension is not the example.")

        def one(*tensors: Tensor) -> Tensor:
            given = iter(tensors)
            leaves = [next(given).unsqueeze(0) if m else x for x, m in zip(self._leaves, self._mapped, strict=True)]
            return self._task(tree_unflatten(leaves, self._spec)).sum()

        tensors = [leaf for leaf, m in zip(self._leaves, self._mapped, strict=True) if m]
        return torch.func.vmap(one)(*tensors)  # type: ignore[no-any-return]
