"""TracIn: the loss decrease of a query, traced through every step that an example was in (Pruthi et al., 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.method import Evidence, Method
from lightning_influence.numerics.clipping import ByNorm
from lightning_influence.replay import MAX_DRIFT, Moment, Replayed
from lightning_influence.replay.scoring import Told, tell_drift
from lightning_influence.replay.second import scaled_products
from lightning_influence.setting import Queries, Setting
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.exposure import gain


@dataclass(frozen=True)
class TracIn(Method):
    r"""How much each training example lowered a query's loss at the steps that it was in, to first order.

    .. math:: s(q, z_i) = \sum_{t: i \in B_t} c_{ti} \, \nabla\ell(w_t, q) \cdot \nabla\ell(w_t, z_i)

    with c the learning rate × weight in the step's gradient / (1 - momentum). The captured fit is run once more; an
    example's gradient is that of its step, dropout included.

    Source: Pruthi, Liu, Kale, Sundararajan. Estimating Training Data Influence by Tracing Gradient Descent.
    NeurIPS 2020.
    Needs: the batch order, learning rates and checkpoints of a fit by an optimizer that can be replayed.
    Units: query loss, counted when the example was seen; arbitrary where the optimizer rescales gradients.
    Cost: the fit once more, and a backward pass a query and step.
    Departs from the paper: the coefficient counts the example's weight in its batch, and momentum.

    Args:
        max_drift: a replay that strays from the captured weights by more, relative to the distance that they moved
            between checkpoints, is an error.

    Raises:
        ValueError: another ``max_drift``; an optimizer without a rule; a loss that mixes examples in
            training without ``loss=``.
        MissingEvidence: a fit that was not captured step by step.
        DriftError: a replay that is not the fit.
    """

    max_drift: float = MAX_DRIFT
    needs: ClassVar[Evidence] = Evidence.CHECKPOINTS | Evidence.BATCH_ORDER
    walks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.max_drift > 0:
            raise ValueError(f"Expected `max_drift` to be a positive number, got {self.max_drift!r}.")

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]."""
        replay, total = Replayed(max_drift=self.max_drift).replay(setting), setting.zeros(queries)
        told = Told(setting, sum(len(batch.ids) for step in replay.steps for batch in step.batches))
        with replay.training():
            for number, segment in enumerate(replay.segments):
                for moment in replay.walk(replay.start(number), segment.steps, separate=True):
                    replay.stand(moment)
                    with replay.forward.scoring():
                        gradients = queries.gradients()
                    pull = _pull(moment, setting)
                    for batch in moment.step.batches:
                        products = scaled_products(replay.forward, batch, moment.step, gradients, pull)
                        total.index_add_(1, torch.as_tensor(batch.ids, device=total.device), products.to(total))
                    told(moment.step)
                replay.compare(number, replay.after)
        told.rest()
        tell_drift(setting, replay)
        return total

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """The final weights: earlier ones are where the replay starts from."""
        return [] if trajectory is None else [len(trajectory.checkpoints) - 1]

    def unit(self, setting: Setting) -> str:
        """Loss, unless the optimizer took the scale away."""
        adaptive = setting.trajectory is not None and setting.trajectory.adaptive
        return "arbitrary" if adaptive else "loss (summed over the moments the example was seen)"


def _pull(moment: Moment, setting: Setting) -> Tensor:
    """[group]: what a step moves the weights by, per unit of gradient, in the end."""
    groups = setting.engine.groups
    pull = torch.zeros(1 + max(groups.values(), default=0), dtype=torch.float64)
    for name, options in moment.step.moves.options.items():
        pull[groups.get(name, 0)] = options["lr"] * gain(dict(options))
    clipping = moment.step.clipping
    if isinstance(clipping, ByNorm) and moment.gradients:
        pull = pull * float(clipping.factor(moment.gradients))
    return pull
