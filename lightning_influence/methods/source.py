"""SOURCE: influence through segments of training, each with its own curvature (Bae et al., 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.checks import check_integer
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.curvature.damping import reach_at
from lightning_influence.curvature.descent import Descent
from lightning_influence.curvature.ekfac import EKFAC
from lightning_influence.curvature.preconditioner import check_optimizers, descent_at
from lightning_influence.curvature.store import prepared_at, preparing
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.gradients.running_sum import RunningSum
from lightning_influence.methods.kinds import TrainBlock
from lightning_influence.methods.method import Evidence
from lightning_influence.methods.segment_product import SegmentProduct
from lightning_influence.setting.own_queries import ExampleQueries, gradients_of
from lightning_influence.setting.samples import Samples, first_queries
from lightning_influence.setting.setting import Queries, Setting, Stage
from lightning_influence.timing import Work, seconds_of, timed
from lightning_influence.types import MissingEvidence
from lightning_influence.wording import counted

# Vectors of the model's size for each example that is carried back for itself.
_OWN_COPIES = 3


@dataclass(frozen=True, eq=False)
class SourceSegment:
    """A segment of training, whose curvature and preconditioner are taken as constant.

    Args:
        checkpoints: positions in the trajectory; gradients of training examples are averaged over them.
        reach: sum of learning rate / (1 - momentum) over the segment's steps, [group] float64.
        shrunk: sum of learning rate × decoupled weight decay over the segment's steps, [group] float64.
    """

    checkpoints: tuple[int, ...]
    reach: Tensor
    shrunk: Tensor

    @property
    def middle(self) -> int:
        """The checkpoint whose curvature and preconditioner are used."""
        return self.checkpoints[len(self.checkpoints) // 2]


@dataclass(frozen=True)
class SOURCE(SegmentProduct):
    r"""How much higher a query's loss would be if the model were trained without the example, segment by segment.

    .. math:: s(q, z_i) = \frac1n \sum_l \nabla\ell(w_T, q)^\top S_L \cdots S_{l+1} F_l \, \bar g_{li}, \quad
        S_l = e^{-T_l C_l}, \; F_l = (I - S_l) C_l^{-1}

    with :math:`T_l` the sum of the segment's learning rates over (1 - momentum), :math:`C_l` the curvature of the mean
    training loss with the fit's L2 weight decay on its diagonal, and :math:`\bar g_{li}` the example's gradient,
    averaged over the segment's checkpoints. With one segment the scores are close to those of an influence function
    whose damping is :math:`1 / T`: the longer the segment, the smaller the damping.

    Adam and AdamW are taken as gradient descent with a preconditioner P, 1 / (root of the mean squares + eps), that is
    constant in a segment: the one at its middle checkpoint, 0 for weights that had no gradient by then. Then
    :math:`S = P^{1/2} e^{-T M} P^{-1/2}` and :math:`F = P^{1/2} (I - e^{-T M}) M^{-1} P^{1/2}` with
    :math:`M = P^{1/2} C P^{1/2}`, to which AdamW's decoupled weight decay is added. Different learning rates of
    parameter groups are part of P.

    Source: Bae, Lin, Lorraine, Grosse. Training Data Attribution via Approximate Unrolled Differentiation.
    NeurIPS 2024.
    Needs: checkpoints with learning rates, and with Adam's state where it was used, as `Influence` writes them.
    Units: query loss, to first order. Where a fit has memorised its examples, leaving one out changes its loss by more:
    exact leave-one-out was up to 8 times the self-influence (measured; nothing detects it here),
    and after a short fit by AdamW a sixth of it.
    Cost: preparing one curvature per segment (kept with the run), one backward pass per example and checkpoint, and one
    product with every query per example and segment. Self-influence: also a change of basis per example, segment and
    layer.
    Memory: one vector of the model's size per query and segment, and up to half a GiB of sums of gradients.
    Departs from the paper: a segment's curvature and preconditioner are those at its middle checkpoint, not averages
    over its checkpoints. ``EKFAC`` uses the diagonal of P in each layer's Kronecker eigenbasis; ``ExactGGN`` uses P.

    Args:
        segments: the number of segments; at most the number of checkpoints after the initial weights.
        curvature: ``EKFAC()``, or ``ExactGGN()`` for small models. Its ``damping`` is added to C; None means 0 here.

    Raises:
        ValueError: fewer than one segment; an optimizer other than SGD, Adam and AdamW; `maximize=True`.
        MissingEvidence: no steps between checkpoints; checkpoints of Adam without its state.
        TypeError: a curvature that does not compute eigenvalues.
    """

    segments: int = 3
    curvature: Curvature = field(default_factory=EKFAC)
    needs: ClassVar[Evidence] = Evidence.CHECKPOINTS
    reads_optimizer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer("segments", self.segments)
        if not isinstance(self.curvature, Curvature) or not self.curvature.has_eigenvalues:
            raise TypeError(
                f"Expected `curvature` to be one with eigenvalues, `EKFAC()` or `ExactGGN()`, got {self.curvature!r}."
            )

    def segments_of(self, setting: Setting) -> list[SourceSegment]:
        """The segments of the fit, found at the first call."""
        run = setting.state(self, _SegmentedRun)
        run.segments = run.segments or self._segments(setting)
        return run.segments

    def checkpoints_by_segment(self, setting: Setting) -> list[tuple[int, ...]]:
        """The checkpoints of each segment."""
        return [segment.checkpoints for segment in self.segments_of(setting)]

    def directions(self, setting: Setting, queries: Queries) -> list[DenseQueries]:
        """For each segment the queries' gradients, carried back through the segments after it and moved in its own."""
        run = setting.state(self, _SegmentedRun)
        if run.queries is not queries:  # another tile of training examples takes the same
            run.queries, run.directions = queries, self._directions(setting, setting.final().gradients(queries))
        return run.directions

    def self_influence(self, setting: Setting) -> Tensor:
        """The same with each example as its own query, [train].

        The gradients of a block of examples are carried back through the segments, and multiplied in each with the sum
        of the same examples' gradients at its checkpoints.

        Raises:
            ValueError: the loss in eval mode does not depend on a parameter that trained.
        """
        if setting.refused is not None:
            raise ValueError(setting.refused)
        total, own = setting.zeros(), range(0)
        step = self._own_at_once(setting)
        most = max(setting.processes.gathered(len(setting.ids)))
        for start in range(0, most, step):
            here = setting.ids[start : start + step]
            own = here or own  # another process has one more block, and prepares its curvatures with this one
            setting.final()
            carried: Any = ExampleQueries(setting, own).gradients()
            for segment in reversed(self.segments_of(setting)):
                stage, descent = self._stretch(setting, segment)
                prepared = prepared_at(self.curvature, setting, stage)
                moved, carried = self.curvature.descend_own(prepared, carried, setting, descent)
                if here:
                    total[start : start + len(here)] += self._own_products(setting, segment, here, moved)
        return total

    def _own_products(self, setting: Setting, segment: SourceSegment, ids: range, moved: Any) -> Tensor:
        """Products of vectors of one segment with the examples' own gradients in it, [example]."""
        sums: dict[range, RunningSum] = {}
        for _ in setting.stages(segment.checkpoints):
            for some, gradients in gradients_of(setting, ids):
                sums.setdefault(range(some[0], some[-1] + 1), RunningSum()).add(gradients)
                setting.on_block(len(some))
        found = []
        for some in list(sums):
            total, first = sums.pop(some).result(), some.start - ids.start
            product = moved.slice(slice(first, first + len(some))).diagonal(total)
            found.append(self._share(setting, some, product, segment))
        return torch.cat(found)

    def product(self, stage: Stage, query: QueryGradients, block: TrainBlock) -> Tensor:
        """Products with the directions, divided by n and by the number of checkpoints averaged, [query, example]."""
        run = stage.setting.state(self, _SegmentedRun)
        segment = run.segments[run.segment_at(stage)]
        return self._share(stage.setting, block.ids, query.dot(block.gradients), segment)

    def _share(self, setting: Setting, ids: Sequence[int], product: Tensor, segment: SourceSegment) -> Tensor:
        """Products times the examples' weights in the training loss, over the number of checkpoints averaged."""
        weights = setting.engine.weights_of(ids)
        product = product if weights is None else product * weights.to(product)
        return product / (setting.n_train * len(segment.checkpoints))

    def _segments(self, setting: Setting) -> list[SourceSegment]:
        """Divides the checkpoints into segments of nearly the same length.

        Raises:
            MissingEvidence: no steps lie between the checkpoints, or some of them were removed.
            ValueError: see the class.
        """
        positions = self.positions(setting.trajectory)
        assert setting.trajectory is not None
        check_optimizers(setting.trajectory)
        if removed := setting.trajectory.removed:
            raise MissingEvidence(
                f"Expected the checkpoints of the whole fit for `SOURCE`, got a fit in which {len(removed)}"
                " were removed (`keep_last=`). Fit without `keep_last=`, or use `TracInCP()`, which counts those kept."
            )
        count = min(self.segments, len(positions))
        if count < self.segments:
            setting.note(f"Only {counted(count, 'segment')}: the fit has no more checkpoints after its initial weights")
        ends = [round((k + 1) * len(positions) / count) for k in range(count)]
        found, before = [], torch.zeros((), dtype=torch.float64)
        for first, last in zip([0, *ends], ends, strict=False):
            until = reach_at(setting, positions[last - 1])
            if until is None:
                raise MissingEvidence(
                    "`SOURCE` needs checkpoints after the first step, got only the initial weights. Fit with "
                    "`Trainer(callbacks=[Influence()])`, or use `GradientDot()`."
                )
            run = range(positions[first], positions[last - 1] + 1)
            shrunk = torch.stack([setting.trajectory.shrinkage(k) for k in run]).sum(0)
            found.append(SourceSegment(tuple(positions[first:last]), until - before, shrunk))
            before = until
        reaches = ", ".join(_shown(segment.reach) for segment in found)
        setting.note(f"{counted(count, 'segment')} with sums of learning rates / (1 - momentum) of {reaches}")
        if setting.trajectory.adaptive:
            setting.note("Adam's preconditioner is frozen in each segment, at that of its middle checkpoint")
        return found

    def _directions(self, setting: Setting, final: QueryGradients) -> list[DenseQueries]:
        """For each segment the final gradients of queries, carried back through the segments after it."""
        carried = final.dense()
        directions: list[DenseQueries] = []
        for segment in reversed(self.segments_of(setting)):
            stage, descent = self._stretch(setting, segment)
            prepared = prepared_at(self.curvature, setting, stage)
            moved, carried = self.curvature.descend(prepared, carried, setting, descent)
            directions.append(DenseQueries(moved, setting.engine.groups))
        return directions[::-1]

    def _stretch(self, setting: Setting, segment: SourceSegment) -> tuple[Stage, Descent]:
        """A segment's middle checkpoint, which is loaded, and the segment as a stretch of gradient descent."""
        (stage,) = setting.stages([segment.middle])
        return stage, descent_at(setting, stage, self.curvature.damping or 0.0, segment.reach, segment.shrunk)

    # ---- the record ---------------------------------------------------------------------------------------------

    def queries_at_once(self, setting: Setting) -> int | None:
        """As many dense gradients as the curvature has in memory at once, divided among the segments."""
        most = self.curvature.at_once(setting)
        return None if most is None else max(1, most // (self.segments + 1))

    def _own_at_once(self, setting: Setting) -> int:
        """Examples that are carried back at once: for each there are two dense vectors, and a sum and its changes."""
        most = self.curvature.at_once(setting)
        return setting.examples.block_size if most is None else max(1, most // _OWN_COPIES)

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """The curvatures of all segments and the queries carried through them, besides sums and products."""
        divided, size = seconds_of(lambda: self.segments_of(setting)), setting.examples.block_size
        count, segments = setting.n_train if queries is None else len(queries), self.segments_of(setting)
        middles = setting.stages([segment.middle for segment in segments])
        begun = [Work("segments", 1, divided), *preparing(self.curvature, setting, middles)]
        _, descent = self._stretch(setting, segments[-1])
        held = min(
            count, size, (self._own_at_once(setting) if queries is None else self.queries_at_once(setting)) or size
        )
        some = ExampleQueries(setting, range(held)) if queries is None else first_queries(queries)[:held]
        gradients = some.gradients()
        if queries is None:
            return [*begun, *self._own_work(setting, gradients, descent)]
        carried = self.curvature.seconds_of_descent(setting, gradients.dense(), descent) / held
        return [
            *begun,
            Work("gradients of queries", count, timed(lambda: some.gradients().dense()) / held),
            Work("carrying queries back", len(segments) * count, carried),
            *super().work(setting, queries),
        ]

    def _own_work(self, setting: Setting, gradients: QueryGradients, descent: Descent) -> list[Work]:
        """Carrying each example back, of which some gradients are given, sums and products with its own."""
        segments, held, step = self.segments_of(setting), len(gradients), self._own_at_once(setting)
        moved, first, again = self.curvature.seconds_of_own_descent(setting, gradients, descent)
        own = Samples.of(setting).gradients().slice(slice(0, held))

        def one_segment() -> Tensor:
            total = RunningSum()
            for _ in max(segments, key=lambda segment: len(segment.checkpoints)).checkpoints:
                total.add(own)
            return moved.slice(slice(0, len(own))).diagonal(total.result())

        passes, n = len(self.positions(setting.trajectory)), setting.n_train
        return [
            Work("checkpoints", (passes + 2 * len(segments)) * -(-n // step), seconds_of(setting.final)),
            *Samples.of(setting).passes(passes + 1),
            Work("carrying examples into a segment", n, first / held),
            Work("carrying examples back", (len(segments) - 1) * n, again / held),
            Work("sums and products", len(segments) * n, timed(one_segment) / len(own)),
        ]

    def unit(self, setting: Setting) -> str:
        """Loss, since the scores are predicted differences of losses."""
        return "loss"


@dataclass
class _SegmentedRun:
    """What is kept for later tiles.

    Args:
        segments: of the run.
        queries: the block of queries that ``directions`` belongs to.
        directions: of these, one entry per segment.
    """

    segments: list[SourceSegment] = field(default_factory=list)
    queries: Queries | None = None
    directions: list[DenseQueries] = field(default_factory=list)

    def segment_at(self, stage: Stage) -> int:
        """The index of the segment that has the stage's checkpoint."""
        return next(k for k, segment in enumerate(self.segments) if stage.position in segment.checkpoints)


def _shown(reach: Tensor) -> str:
    """One number, or the smallest and the largest if parameter groups differ."""
    least, most = float(reach.min()), float(reach.max())
    return f"{most:.3g}" if most - least <= 1e-6 * abs(most) else f"{least:.3g} to {most:.3g}"
