"""Derivatives of examples' final losses by their own weights, without second derivatives, in one walk backwards."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.gradients import Gradients
from lightning_influence.numerics.clipping import ByNorm
from lightning_influence.numerics.optimizers import OptimizerState
from lightning_influence.replay.replay import Replay, ReplayedStep
from lightning_influence.replay.steps import MicroBatch, Step

# The factors of two vectors may differ by this many units in the last place.
_ROUNDING = 1e4


def own_products(
    replay: Replay,
    final: Callable[[Sequence[int]], Gradients],
    renormalize: bool = False,
    done: Callable[[Step], Any] = lambda step: None,
) -> Tensor | None:
    """What ``adjoint`` finds without the Hessian for each example as its own query.

    A weight is then changed by later steps without the others, so that the derivatives by a step's gradient are those
    at the end times a factor per entry, which is the same for all queries.

    Args:
        replay: the fit.
        final: gradients of examples at the final weights, which it loads.
        renormalize: an example's weight also counts in the divisor of its micro-batch.
        done: called after every step.

    Returns:
        [train]; None where the losses of a batch are joint, or an optimizer mixes the entries of a parameter.
    """
    if replay.forward.joint:
        return None
    walk, first = _Factors(replay), True
    total = walk.like.new_zeros(len(replay.examples))
    with replay.training():
        for moment in replay.backwards():
            if replay.forward.check(moment.step, separate=True):
                if replay.forward.joint:
                    return None
                replay.load(moment.before, moment.step)
            factors = walk.back(moment)
            if first and walk.mixes:  # a device is not made to wait at every step
                return None
            first = False
            if factors:
                batches = moment.step.batches
                rows = [replay.forward.rows(batch) for batch in batches]
                step = _StepProducts(replay, moment, factors, renormalize and replay.forward.mean)
                for batch, each in zip(batches, rows, strict=True):
                    with replay.forward.scoring():
                        own = final(batch.ids)
                    total.index_add_(
                        0, torch.as_tensor(batch.ids).to(total.device), step.of(batch, own, each).to(total)
                    )
            done(moment.step)
    return None if walk.mixes else total


class _Factors:
    """The derivative of every entry of the final weights by the same entry of a step's gradient, step by step."""

    def __init__(self, replay: Replay) -> None:
        parameters = replay.engine.task.named_parameters(replay.trained)
        draw = torch.Generator().manual_seed(0)
        # Beside ones, signs, whose factors are the same unless entries are mixed.
        self._signs = {
            name: (2 * torch.randint(2, p.shape, generator=draw) - 1).to(p) for name, p in parameters.items()
        }
        self._by_weight = {name: torch.stack([torch.ones_like(p), self._signs[name]]) for name, p in parameters.items()}
        self._by_state: dict[str, OptimizerState] = {}
        self.like = next(iter(parameters.values())).detach()
        self._mixed = torch.zeros((), dtype=torch.bool, device=self.like.device)

    @property
    def mixes(self) -> bool:
        """Whether a step so far mixed the entries of a parameter."""
        return bool(self._mixed)

    def back(self, moment: ReplayedStep) -> dict[str, Tensor]:
        """The factors at one step, [*shape] by the names of the parameters that it moves; see ``mixes``."""
        step, found = moment.step, {}
        clipped = moment.gradients if step.clipping is None else step.clipping(moment.gradients)
        for name, gradient in clipped.items():
            at = moment.before.before(name, gradient, step)
            both, self._by_weight[name], self._by_state[name] = step.moves.rule.adjoint(
                at, self._by_weight[name], self._by_state.get(name, {})
            )
            found[name] = both[0]
            if not step.moves.rule.uniform:
                gap = (both[1] * self._signs[name] - both[0]).abs().max()
                self._mixed |= ~(gap <= _ROUNDING * torch.finfo(gap.dtype).eps * both.abs().max())
        return found


class _StepProducts:
    r"""Products of final gradients with gradients at one step, through clipping and the steps after it.

    With factors D and a gradient clipped by its norm, whose derivative is :math:`c I - r\, g g^\top`, the product of a
    final gradient f with x is :math:`c\, (D f)^\top x - r\, (D f)^\top g \; g^\top x`.

    Args:
        replay: the fit.
        moment: the step.
        factors: D, [*shape] by the names of the parameters that the step moves.
        renormalize: an example's weight also counts in the divisor of its micro-batch.
    """

    def __init__(self, replay: Replay, moment: ReplayedStep, factors: Mapping[str, Tensor], renormalize: bool) -> None:
        self.replay, self.step, self.renormalize = replay, moment.step, renormalize
        self.gradients = {name: moment.gradients[name] for name in factors}
        self.scale: Tensor | float = 1.0
        self.less: Tensor | None = None
        clipping = moment.step.clipping
        if isinstance(clipping, ByNorm):
            self.scale, self.less = clipping.terms(moment.gradients)
        elif clipping is not None:
            ones = {name: torch.ones_like(gradient)[None] for name, gradient in moment.gradients.items()}
            masks = clipping.derivative(moment.gradients, ones)
            factors = {name: factor * masks[name][0] for name, factor in factors.items()}
        self.factors = factors

    def of(self, batch: MicroBatch, final: Gradients, rows: Gradients) -> Tensor:
        """[example]: the final gradients of a micro-batch's examples times their shares of the step's gradient."""
        final, rows = final.only(self.factors), rows.only(self.factors)
        product = final.own_dot(rows, self.factors)
        share = torch.as_tensor(self.replay.forward.share(batch, self.step), dtype=product.dtype).to(product)
        product = self.scale * product
        along = None if self.less is None else self.less * final.times(self._entrywise(self.gradients))
        if along is not None:
            product = product - along * rows.times(self.gradients)
        if not self.renormalize:
            return product * share
        shares = share.expand(len(batch.ids))
        weighted = rows.scaled(dict.fromkeys(rows.parts, shares)).total()
        zeros = {name: torch.zeros_like(gradient) for name, gradient in self.gradients.items()}
        whole = self.scale * final.times(self._entrywise(zeros | weighted))
        if along is not None:
            whole = whole - along * sum((self.gradients[n] * value).sum() for n, value in weighted.items())
        return product * share - whole * (shares / shares.sum() if share.ndim else 1 / len(batch.ids))

    def _entrywise(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: factor * vector[name] for name, factor in self.factors.items()}
