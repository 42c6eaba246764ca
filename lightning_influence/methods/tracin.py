"""TracIn: how training on an example lowered a query's loss, at every step with it (Pruthi et al., 2020)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_positive, one_of
from lightning_influence.gradients.queries import EachQuery
from lightning_influence.gradients.transforms import Transforms, check_projection, refuse_constant, scale
from lightning_influence.methods.kinds import WholeRun
from lightning_influence.methods.method import Evidence
from lightning_influence.numerics.clipping import ByNorm
from lightning_influence.numerics.projections import RandomProjection
from lightning_influence.replay.hessian_products import scaled_products
from lightning_influence.replay.progress import ReplayProgress, note_drift
from lightning_influence.replay.replay import MAX_DRIFT, Replay, ReplayedStep
from lightning_influence.replay.samples import seconds_of_walk
from lightning_influence.replay.steps import Step, examples_of
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.timing import seconds_of
from lightning_influence.trajectory.parameter_groups import gain


@dataclass(frozen=True)
class TracIn(WholeRun):
    r"""How much training on each example lowered a query's loss, to first order at every step with the example.

    .. math:: s(q, z_i) = \sum_{t: i \in B_t} c_{ti} \, \nabla\ell(w_t, q) \cdot \nabla\ell(w_t, z_i)

    with batches B and c the learning rate × weight in the step's gradient / (1 - momentum). The captured fit is
    replayed, so that gradients are those of the fit, dropout and augmentation included.

    Source: Pruthi, Liu, Kale, Sundararajan. Estimating Training Data Influence by Tracing Gradient Descent.
    NeurIPS 2020. ``normalize`` as in ``TracInCP``.
    Needs: the batch order, learning rates and checkpoints of a fit by an optimizer that can be replayed.
    Units: query loss, summed over the steps with the example; arbitrary if gradients are normalised or the optimizer
    rescales them.
    Cost: one replay of the fit, and one backward pass per query and step. Self-influence: one more backward pass per
    example and step.
    Departs from the paper: the coefficient counts the example's weight in its batch, and momentum.

    Args:
        normalize: ``"cosine"``: the cosine of the angle between the gradients; ``"layerwise"``: the sum of all layers'
            cosines; None: the plain inner product.
        projection: multiply random projections of the gradients, which gives the same scores on average.
        max_drift: the largest distance of replayed from captured weights, relative to the distance that they moved
            between checkpoints; a larger one is an error.

    Raises:
        ValueError: other values; an optimizer that cannot be replayed; a loss that mixes examples in training (batch
            normalisation) without ``loss=``; ``normalize`` or ``projection`` together with ``loss=``; self-influence
            with ``normalize``, which is the same for all examples.
        MissingEvidence: a fit that was not captured step by step.
        DriftError: replayed weights that differ from the captured ones by more than ``max_drift``.
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
        """Sum the products at each step of the replay, [query, train]."""
        return self._walk(setting, queries)

    def self_influence(self, setting: Setting) -> Tensor:
        """The same with each example as its own query, [train]."""
        refuse_constant(self.normalize)
        return self._walk(setting, None)

    def seconds(self, setting: Setting, queries: Queries | None) -> float:
        """Time a few steps of the replay."""
        total, replay = seconds_of(lambda: self._replay(setting)), self._replay(setting)
        total += seconds_of(setting.final) * (len(replay.segments) + 1)

        def walk(few: Replay) -> None:
            with few.training():
                list(self._visits(setting, few, 0, few.steps, queries))

        return total + seconds_of_walk(replay, walk)

    def unit(self, setting: Setting) -> str:
        """Loss; arbitrary with ``normalize`` or an adaptive optimizer."""
        adaptive = setting.trajectory is not None and setting.trajectory.adaptive
        return "arbitrary" if adaptive or self.normalize else "loss (summed over the steps with the example)"

    def _walk(self, setting: Setting, queries: Queries | None) -> Tensor:
        total, replay = setting.zeros(queries), self._replay(setting)
        progress = ReplayProgress(setting, examples_of(replay.steps))
        with replay.training():
            for number, segment in enumerate(replay.segments):
                for step, found in self._visits(setting, replay, number, segment.steps, queries):
                    for batch, of_batch in zip(step.batches, found, strict=True):
                        ids = torch.as_tensor(batch.ids, device=total.device)
                        total.index_add_(total.ndim - 1, ids, of_batch.to(total))
                    progress(step)
                replay.compare(number, replay.after)
        progress.finish()
        note_drift(setting, replay)
        return total

    def _visits(
        self, setting: Setting, replay: Replay, segment: int, steps: Sequence[Step], queries: Queries | None
    ) -> Iterator[tuple[Step, list[Tensor]]]:
        """Replays the first steps of a segment, and yields each with its products.

        Per micro-batch, they are [query, example], or [example] with each example as its own query.
        """
        if self.normalize is not None:
            setting.note(scale(self.normalize, weighted=True))
        forward, transforms = replay.forward, setting.state(self, Transforms, self.normalize, self.projection)
        for replayed in replay.walk(replay.start(segment), steps, separate=True):
            replay.load(replayed.before, replayed.step)
            step, rates = replayed.step, _effective_rates(replayed, setting)
            with forward.scoring():
                if queries is not None:
                    sides = [transforms(queries.gradients())] * len(step.batches)
                else:
                    sides = [EachQuery([transforms(forward.rows(batch, as_drawn=False))]) for batch in step.batches]
            pairs = zip(step.batches, sides, strict=True)
            products = [scaled_products(forward, batch, step, side, rates, transforms) for batch, side in pairs]
            yield step, products if queries is not None else [product.diagonal() for product in products]

    def _replay(self, setting: Setting) -> Replay:
        replay = setting.state(self, Replay, setting.engine, setting.examples, setting.trajectory, self.max_drift)
        if replay.forward.joint and (self.normalize is not None or self.projection is not None):
            raise ValueError(
                f"Expected `normalize=None` and `projection=None` with `loss=`, got {self.normalize!r} and "
                f"{self.projection!r}: the losses of a joint batch give products of its examples' gradients, not the "
                "gradients themselves. Leave them out, or use `TracInCP`, which computes examples one by one."
            )
        return replay


def _effective_rates(replayed: ReplayedStep, setting: Setting) -> Tensor:
    """Learning rate × factor of gradient clipping / (1 - momentum) of a step, [group]."""
    groups = setting.engine.groups
    rates = torch.zeros(1 + max(groups.values(), default=0), dtype=torch.float64)
    for name, options in replayed.step.moves.options.items():
        rates[groups.get(name, 0)] = options["lr"] * gain(dict(options))
    clipping = replayed.step.clipping
    if isinstance(clipping, ByNorm) and replayed.gradients:
        rates = rates * float(clipping.factor(replayed.gradients))
    return rates
