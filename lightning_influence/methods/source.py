"""SOURCE: influence through segments of training, each with its own curvature (Bae et al., 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.checks import check_integer
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.curvature.damping import reach_at
from lightning_influence.curvature.ekfac import EKFAC
from lightning_influence.curvature.preconditioner import check_optimizers, descent_at
from lightning_influence.curvature.store import prepared_at
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.methods.kinds import TrainBlock
from lightning_influence.methods.method import Evidence
from lightning_influence.methods.segment_product import SegmentProduct
from lightning_influence.setting.own_queries import ExampleQueries, gradients_of
from lightning_influence.setting.samples import Samples, first_queries
from lightning_influence.setting.setting import Queries, Setting, Stage
from lightning_influence.timing import Work, seconds_of, timed
from lightning_influence.types import MissingEvidence


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
    constant in a segment: the one at its middle checkpoint. Then :math:`S = P^{1/2} e^{-T M} P^{-1/2}` and
    :math:`F = P^{1/2} (I - e^{-T M}) M^{-1} P^{1/2}` with :math:`M = P^{1/2} C P^{1/2}`, to which AdamW's decoupled
    weight decay is added. Different learning rates of parameter groups are part of P.

    Source: Bae, Lin, Lorraine, Grosse. Training Data Attribution via Approximate Unrolled Differentiation.
    NeurIPS 2024.
    Needs: checkpoints with learning rates, and with Adam's state where it was used, as `Influence` writes them.
    Units: query loss, to first order. Where a fit has memorised its examples, leaving one out changes its loss by more:
    exact leave-one-out was up to 8 times the self-influence (measured; nothing detects it here),
    and after a short fit by AdamW a sixth of it.
    Cost: preparing one curvature per segment (kept with the run), one backward pass per example and checkpoint, and one
    product with every query per example and segment. Self-influence: also three changes of basis per example, segment
    and layer.
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

        The directions of a block of examples are carried through the segments, then multiplied with the gradients of
        the same examples at every checkpoint.
        """
        if setting.refused is not None:
            raise ValueError(setting.refused)
        total, run = setting.zeros(), setting.state(self, _SegmentedRun)
        step = self.queries_at_once(setting) or setting.examples.block_size
        most = max(setting.processes.gathered(len(setting.ids)))
        for start in range(0, most, step):
            here, run.queries = setting.ids[start : start + step], None
            run.own = here or run.own  # another process has one more block, and prepares its curvatures with this one
            setting.final()
            run.directions = self._directions(setting, ExampleQueries(setting, run.own).gradients())
            if not here:
                break
            for stage in setting.stages(self.positions(setting.trajectory)):
                for ids, gradients in gradients_of(setting, run.own):
                    block = TrainBlock(gradients, range(ids[0], ids[-1] + 1), None)
                    first = ids[0] - setting.ids.start
                    total[first : first + len(ids)] += self.product_with_itself(stage, block)
                    setting.on_block(len(ids))
        return total

    def product_with_itself(self, stage: Stage, block: TrainBlock) -> Tensor:
        """Products with the examples' own directions, which were kept, [example]."""
        run = stage.setting.state(self, _SegmentedRun)
        segment, first = run.segment_at(stage), block.ids.start - run.own.start
        directions = run.directions[segment].slice(slice(first, first + len(block.ids)))
        return self._share(stage, block.ids, directions.diagonal(block.gradients), segment)

    def product(self, stage: Stage, query: QueryGradients, block: TrainBlock) -> Tensor:
        """Products with the directions, divided by n and by the number of checkpoints averaged, [query, example]."""
        segment = stage.setting.state(self, _SegmentedRun).segment_at(stage)
        return self._share(stage, block.ids, query.dot(block.gradients), segment)

    def _share(self, stage: Stage, ids: Sequence[int], product: Tensor, segment: int) -> Tensor:
        """Products times the examples' weights in the training loss, over the number of checkpoints averaged."""
        averaged = len(stage.setting.state(self, _SegmentedRun).segments[segment].checkpoints)
        weights = stage.setting.engine.weights_of(ids)
        return (product if weights is None else product * weights.to(product)) / (stage.setting.n_train * averaged)

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
            setting.note(f"Only {count} segments: the fit has no more checkpoints after its initial weights")
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
        setting.note(f"{count} segments with sums of learning rates / (1 - momentum) of {reaches}")
        if setting.trajectory.adaptive:
            setting.note("Adam's preconditioner is frozen in each segment, at that of its middle checkpoint")
        return found

    def _directions(self, setting: Setting, final: QueryGradients) -> list[DenseQueries]:
        """For each segment the final gradients of queries, carried back through the segments after it."""
        carried = final.dense()
        directions: list[DenseQueries] = []
        for segment in reversed(self.segments_of(setting)):
            (stage,) = setting.stages([segment.middle])
            prepared = prepared_at(self.curvature, setting, stage)
            descent = descent_at(setting, stage, self.curvature.damping or 0.0, segment.reach, segment.shrunk)
            moved, carried = self.curvature.descend(prepared, carried, setting, descent)
            directions.append(DenseQueries(moved, setting.engine.groups))
        return directions[::-1]

    # ---- the record ---------------------------------------------------------------------------------------------

    def queries_at_once(self, setting: Setting) -> int | None:
        """As many dense gradients as the curvature has in memory at once, divided among the segments."""
        most = self.curvature.at_once(setting)
        return None if most is None else max(1, most // (self.segments + 1))

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """The curvatures of all segments and the queries carried through them, besides sums and products."""
        run = setting.state(self, _SegmentedRun)
        divided, size = seconds_of(lambda: self.segments_of(setting)), setting.examples.block_size
        count, segments = setting.n_train if queries is None else len(queries), len(run.segments)
        prepared, last = self.curvature.seconds(setting, 0), run.segments[-1]
        held = min(count, size, self.queries_at_once(setting) or size)
        some = ExampleQueries(setting, range(held)) if queries is None else first_queries(queries)[:held]
        (stage,) = setting.stages([last.middle])
        vectors = some.gradients().dense()
        descent = descent_at(setting, stage, self.curvature.damping or 0.0, last.reach, last.shrunk)
        carried = self.curvature.seconds_of_descent(setting, vectors, descent) / held
        own = queries is None
        return [
            Work("segments", 1, divided),
            Work(f"preparing {type(self.curvature).__name__}", segments, prepared),
            Work("gradients of queries", count, timed(lambda: some.gradients().dense()) / held),
            Work("carrying queries back", segments * count, carried),
            *(self._own_work(stage, vectors) if own else super().work(setting, queries)),
        ]

    def _own_work(self, stage: Stage, vectors: Mapping[str, Tensor]) -> list[Work]:
        """Products with each example's own directions, of which some are given, at all checkpoints."""
        setting, run, held = stage.setting, stage.setting.state(self, _SegmentedRun), len(next(iter(vectors.values())))
        run.own, run.directions = range(held), [DenseQueries(vectors, setting.engine.groups)] * len(run.segments)
        some = TrainBlock(Samples.of(setting).gradients().slice(slice(0, held)), run.own, None)
        passes, step = len(self.positions(setting.trajectory)), self.queries_at_once(setting)
        each = timed(lambda: self.product_with_itself(stage, some)) / held
        return [
            Work("checkpoints", passes * (-(-setting.n_train // step) if step else 1), seconds_of(setting.final)),
            *Samples.of(setting).passes(passes),
            Work("products", passes * setting.n_train, each),
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
        own: without queries, the training examples that it belongs to.
        directions: of these, one entry per segment.
    """

    segments: list[SourceSegment] = field(default_factory=list)
    queries: Queries | None = None
    own: range = range(0)
    directions: list[DenseQueries] = field(default_factory=list)

    def segment_at(self, stage: Stage) -> int:
        """The index of the segment that has the stage's checkpoint."""
        return next(k for k, segment in enumerate(self.segments) if stage.position in segment.checkpoints)


def _shown(reach: Tensor) -> str:
    """One number, or the smallest and the largest if parameter groups differ."""
    least, most = float(reach.min()), float(reach.max())
    return f"{most:.3g}" if most - least <= 1e-6 * abs(most) else f"{least:.3g} to {most:.3g}"
