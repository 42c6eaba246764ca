"""Derivatives of quantities at the end of a fit with respect to the weight of every example in it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.gradients.queries import DenseQueries
from lightning_influence.numerics.optimizers import OptimizerState, UpdateInput
from lightning_influence.replay.buffer_paths import BufferPaths
from lightning_influence.replay.hessian_products import StepProducts, Vectors, scaled_products
from lightning_influence.replay.replay import Replay, ReplayedStep
from lightning_influence.replay.steps import MicroBatch, Step


def adjoint(
    replay: Replay,
    final: Mapping[str, Tensor],
    hessian: bool = True,
    renormalize: bool = False,
    done: Callable[[Step], Any] = lambda step: None,
) -> Tensor:
    """Derivatives of quantities at the end of a fit with respect to its examples' weights, where these are 1.

    Source: the adjoint of the recursion of Chen et al. (2021); Ilyas and Engstrom, MAGIC (2025).

    Args:
        replay: the fit.
        final: derivatives of the quantities with respect to the final weights, [quantity, *shape] by name; absent ones
            are zero.
        hessian: whether a change of the weights changes the gradients of the steps after it.
        renormalize: an example's weight also counts in the divisor of its micro-batch.
        done: called after every step.

    Returns:
        [quantity, train].

    Raises:
        DriftError: the replay does not reproduce the fit.
        ValueError: the examples of a batch change one another's loss; a buffer carries weights to later losses.
    """
    if not hessian and replay.whole:
        found = _one_walk_forward(replay, final, renormalize, done)
        if found is not None:
            return found
    walk = Walk(replay, final, hessian, renormalize)
    paths = BufferPaths(replay) if hessian else None
    with replay.training():
        for moment in replay.backwards():
            if replay.forward.check(moment.step, separate=True):
                replay.load(moment.before, moment.step)
            if paths is not None:
                paths.check(moment)
            walk.back(moment)
            done(moment.step)
    return walk.total


class Walk:
    """Derivatives with respect to the weights and the optimizer's state, carried from the last step to the first."""

    def __init__(self, replay: Replay, final: Mapping[str, Tensor], hessian: bool, renormalize: bool) -> None:
        self.renormalize = renormalize and replay.forward.mean
        self.second = StepProducts(replay.forward, replay.trained if hessian else ())
        self.first = StepProducts(replay.forward, ())
        first = next(iter(final.values()))
        self.by_weight: Vectors = {
            name: final[name] if name in final else p.new_zeros(len(first), *p.shape)
            for name, p in replay.engine.task.named_parameters(replay.trained).items()
        }
        self.by_state: dict[str, OptimizerState] = {}
        self.total = first.new_zeros(len(first), len(replay.examples))

    def back(self, moment: ReplayedStep) -> None:
        """Carries the derivatives through one step; adds those with respect to its examples' weights to ``total``."""
        step, directions = moment.step, {}
        clipped = moment.gradients if step.clipping is None else step.clipping(moment.gradients)
        for name, gradient in clipped.items():
            at = moment.before.before(name, gradient, step)
            directions[name], self.by_weight[name], self.by_state[name] = step.moves.rule.adjoint(
                at, self.by_weight[name], self.by_state.get(name, {})
            )
        if not directions:
            return
        if step.clipping is not None:
            directions = step.clipping.derivative(moment.gradients, directions)
        for batch in step.batches:
            products, curved = self.second.along(batch, step, directions)
            _add(self.total, batch.ids, products, self._share(batch, step))
            for name, change in curved.items():
                self.by_weight[name] = self.by_weight[name] + change
        for batch in step.left_out:
            _add(self.total, batch.ids, self.first.along(batch, step, directions)[0], None)

    def _share(self, batch: MicroBatch, step: Step) -> float | Tensor | None:
        return self.first.forward.share(batch, step) if self.renormalize else None


def _add(total: Tensor, ids: tuple[int, ...], products: Tensor, share: float | Tensor | None) -> None:
    """Adds the products; those with the renormalised loss where the examples' shares in the batch are given."""
    if isinstance(share, Tensor):
        products = products - products.sum(1, keepdim=True) * (share / share.sum()).to(products)
    elif share is not None:
        products = products - products.mean(1, keepdim=True)
    total.index_add_(1, torch.as_tensor(ids, device=total.device), products.to(total))


def _one_walk_forward(
    replay: Replay, final: Mapping[str, Tensor], renormalize: bool, done: Callable[[Step], Any]
) -> Tensor | None:
    """The same without second derivatives, where a step treats every entry of a parameter group alike.

    The derivatives before a step are then those at the end times one number per step and parameter group, so that one
    walk forward suffices and no vector is carried along. None where the steps are of another kind.
    """
    steps, groups = replay.steps, replay.engine.groups
    if any(not step.moves.rule.uniform or step.clipping is not None for step in steps):
        return None
    factors = iter(_factors(replay))
    queries = DenseQueries(final, groups)
    first = next(iter(final.values()))
    total = first.new_zeros(len(first), len(replay.examples))
    with replay.training():
        for segment, part in enumerate(replay.segments):
            for moment in replay.walk(replay.start(segment), part.steps, separate=True):
                step = moment.step
                if moment.gradients.keys() != step.moves.options.keys():
                    return None  # torch does not move a parameter without a gradient, so its factors differ
                factor = next(factors)
                for batch in step.batches:
                    products = scaled_products(replay.forward, batch, step, queries, factor)
                    renormalized = renormalize and replay.forward.mean
                    _add(total, batch.ids, products, replay.forward.share(batch, step) if renormalized else None)
                done(step)
            replay.compare(segment, replay.after)
    return total


def _factors(replay: Replay) -> list[Tensor]:
    """For every step, [group]: the derivative with respect to the step's gradient, relative to the final one."""
    groups = replay.engine.groups
    of_group = {groups.get(name, 0): name for name in replay.trained}  # a group's parameters have the same rule
    start = replay.start()
    one = torch.ones(1, dtype=torch.float64)
    states: dict[int, OptimizerState] = {
        group: dict.fromkeys(start.optimizer.get(name, {}), one[0]) for group, name in of_group.items()
    }
    places: list[dict[int, UpdateInput]] = []
    for step in replay.steps:
        here = {
            group: UpdateInput(one[0], one[0], states[group], 0, step.moves.options[name])
            for group, name in of_group.items()
            if name in step.moves.options
        }
        places.append(here)
        for group, at in here.items():
            states[group] = step.moves.rule.step(at)[1]
    by_weight = dict.fromkeys(of_group, one)
    by_state: dict[int, OptimizerState] = {group: {} for group in of_group}
    found = []
    for step, here in zip(reversed(replay.steps), reversed(places), strict=True):
        factor = torch.zeros(1 + max(of_group, default=0), dtype=torch.float64)
        for group, at in here.items():
            by_gradient, by_weight[group], by_state[group] = step.moves.rule.adjoint(
                at, by_weight[group], by_state[group]
            )
            factor[group] = by_gradient[0]
        found.append(factor)
    return found[::-1]
