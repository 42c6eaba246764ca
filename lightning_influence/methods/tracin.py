"""TracIn: the loss decrease of a query, traced through every step that an example was in (Pruthi et al., 2020)."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_positive, one_of
from lightning_influence.gradients.queries import EachQuery
from lightning_influence.gradients.transforms import Transforms, check_projection, refuse_constant
from lightning_influence.methods.kinds import WholeRun
from lightning_influence.methods.method import Evidence
from lightning_influence.numerics.clipping import ByNorm
from lightning_influence.numerics.projections import RandomProjection
from lightning_influence.replay import MAX_DRIFT, Replay, ReplayedStep
from lightning_influence.replay.forward import Forward
from lightning_influence.replay.hessian_products import scaled_products
from lightning_influence.replay.progress import ReplayProgress, note_drift
from lightning_influence.replay.steps import Step
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.trajectory.exposure import gain

Products = Callable[[Forward, Step, Tensor], list[Tensor]]
"""``products(forward, step, pull)``: [..., example] for each micro-batch of a step, before which the module stands."""


@dataclass(frozen=True)
class TracIn(WholeRun):
    r"""How much each training example lowered a query's loss at the steps that it was in, to first order.

    .. math:: s(q, z_i) = \sum_{t: i \in B_t} c_{ti} \, \nabla\ell(w_t, q) \cdot \nabla\ell(w_t, z_i)

    with c the learning rate × weight in the step's gradient / (1 - momentum). The captured fit is run once more; an
    example's gradient is that of its step, dropout included.

    Source: Pruthi, Liu, Kale, Sundararajan. Estimating Training Data Influence by Tracing Gradient Descent.
    NeurIPS 2020. ``normalize`` as in ``TracInCP``.
    Needs: the batch order, learning rates and checkpoints of a fit by an optimizer that can be replayed.
    Units: query loss, counted when the example was seen; arbitrary where gradients are normalised or the optimizer
    rescales them.
    Cost: the fit once more, and a backward pass a query and step; of itself, one more backward pass an example and
    step.
    Departs from the paper: the coefficient counts the example's weight in its batch, and momentum.

    Args:
        normalize: None, ``"cosine"`` or ``"layerwise"``.
        projection: multiply random projections of the gradients instead: the same on average.
        max_drift: a replay that strays from the captured weights by more, relative to the distance that they moved
            between checkpoints, is an error.

    Raises:
        ValueError: other values; an optimizer without a rule; a loss that mixes examples in training without ``loss=``;
            with ``loss=``, ``normalize`` or ``projection``; self-influence of a normalised method, which is constant.
        MissingEvidence: a fit that was not captured step by step.
        DriftError: a replay that is not the fit.
    """

    normalize: Literal["cosine", "layerwise"] | None = None
    projection: RandomProjection | None = None
    max_drift: float = MAX_DRIFT
    needs: ClassVar[Evidence] = Evidence.CHECKPOINTS | Evidence.BATCH_ORDER

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, (None, "cosine", "layerwise"))
        check_projection(self.projection)
        check_positive("max_drift", self.max_drift)

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]."""
        return self._walk(setting, setting.zeros(queries), self._of_queries(queries))

    def self_influence(self, setting: Setting) -> Tensor:
        """[train]: the same with the example as its own query."""
        refuse_constant(self.normalize)
        return self._walk(setting, setting.zeros(), self._of_itself())

    def seconds(self, setting: Setting, queries: Queries | None) -> float:
        """By timing a few steps."""
        return self._seconds(setting, self._of_itself() if queries is None else self._of_queries(queries))

    def unit(self, setting: Setting) -> str:
        """Loss, unless something took the scale away."""
        adaptive = setting.trajectory is not None and setting.trajectory.adaptive
        return "arbitrary" if adaptive or self.normalize else "loss (summed over the moments the example was seen)"

    def _of_queries(self, queries: Queries) -> Products:
        """[query, example]."""
        sides = Transforms(self.normalize, self.projection)

        def products(forward: Forward, step: Step, pull: Tensor) -> list[Tensor]:
            with forward.scoring():
                gradients = sides(queries.gradients())
            return [scaled_products(forward, batch, step, gradients, pull, sides) for batch in step.batches]

        return products

    def _of_itself(self) -> Products:
        """[example]."""
        sides = Transforms(None, self.projection)

        def products(forward: Forward, step: Step, pull: Tensor) -> list[Tensor]:
            with forward.scoring():
                own = [EachQuery([sides(forward.rows(batch, as_drawn=False))]) for batch in step.batches]
            pairs = zip(step.batches, own, strict=True)
            return [scaled_products(forward, batch, step, mine, pull, sides).diagonal() for batch, mine in pairs]

        return products

    def _walk(self, setting: Setting, total: Tensor, products: Products) -> Tensor:
        replay = self._replay(setting)
        progress = ReplayProgress(setting, sum(len(batch.ids) for step in replay.steps for batch in step.batches))
        with replay.training():
            for number, segment in enumerate(replay.segments):
                for step, found in _visits(setting, replay, number, segment.steps, products):
                    for batch, of_batch in zip(step.batches, found, strict=True):
                        ids = torch.as_tensor(batch.ids, device=total.device)
                        total.index_add_(total.ndim - 1, ids, of_batch.to(total))
                    progress(step)
                replay.compare(number, replay.after)
        progress.finish()
        note_drift(setting, replay)
        return total

    def _seconds(self, setting: Setting, products: Products) -> float:
        replay = self._replay(setting)
        number = next(k for k, segment in enumerate(replay.segments) if segment.steps)
        steps = replay.segments[number].steps[:3]
        with replay.training():
            list(_visits(setting, replay, number, steps[:1], products))
            started = time.perf_counter()
            list(_visits(setting, replay, number, steps, products))
        return (time.perf_counter() - started) * len(replay.steps) / len(steps)

    def _replay(self, setting: Setting) -> Replay:
        replay = setting.state(self, Replay, setting.engine, setting.examples, setting.trajectory, self.max_drift)
        if replay.forward.joint and (self.normalize is not None or self.projection is not None):
            raise ValueError(
                f"Expected `normalize=None` and `projection=None` with `loss=`, got {self.normalize!r} and "
                f"{self.projection!r}: a loss of the joint batch gives products of its examples' gradients, not the "
                "gradients themselves. Leave them out, or use `TracInCP`, which takes examples one by one."
            )
        return replay


def _visits(
    setting: Setting, replay: Replay, segment: int, steps: Sequence[Step], products: Products
) -> Iterator[tuple[Step, list[Tensor]]]:
    """The first steps of a segment, each with its products."""
    for moment in replay.walk(replay.start(segment), steps, separate=True):
        replay.stand(moment)
        yield moment.step, products(replay.forward, moment.step, _pull(moment, setting))


def _pull(moment: ReplayedStep, setting: Setting) -> Tensor:
    """[group]: what a step moves the weights by, per unit of gradient, in the end."""
    groups = setting.engine.groups
    pull = torch.zeros(1 + max(groups.values(), default=0), dtype=torch.float64)
    for name, options in moment.step.moves.options.items():
        pull[groups.get(name, 0)] = options["lr"] * gain(dict(options))
    clipping = moment.step.clipping
    if isinstance(clipping, ByNorm) and moment.gradients:
        pull = pull * float(clipping.factor(moment.gradients))
    return pull
