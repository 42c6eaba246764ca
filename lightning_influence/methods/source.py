"""SOURCE: influence through a few segments of training, each with a curvature of its own (Bae et al., 2024)."""

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
from lightning_influence.methods.kinds import GradientProduct, TrainBlock
from lightning_influence.methods.method import Evidence
from lightning_influence.setting.setting import Queries, Setting, Stage, stage_positions
from lightning_influence.trajectory import Trajectory
from lightning_influence.types import MissingEvidence


@dataclass(frozen=True, eq=False)
class SourceSegment:
    """A stretch of training whose curvature and preconditioner are taken as constant.

    Args:
        checkpoints: positions in the trajectory, at which gradients of training examples are averaged.
        reach: sum of the learning rates in it, over (1 - momentum), [group] float64.
        shrunk: sum of learning rates times decoupled weight decay, [group] float64.
    """

    checkpoints: tuple[int, ...]
    reach: Tensor
    shrunk: Tensor

    @property
    def middle(self) -> int:
        """The checkpoint that stands for it."""
        return self.checkpoints[len(self.checkpoints) // 2]


@dataclass(frozen=True)
class SOURCE(GradientProduct):
    r"""How much higher a query's loss would be, had training gone on without the example, segment by segment.

    .. math:: s(q, z_i) = \frac1n \sum_l \nabla\ell(w_T, q)^\top S_L \cdots S_{l+1} F_l \, \bar g_{li}, \quad
        S_l = e^{-T_l C_l}, \; F_l = (I - S_l) C_l^{-1}

    with :math:`T_l` the sum of the segment's learning rates over (1 - momentum), :math:`C_l` the curvature of the mean
    training loss with the fit's L2 weight decay on its diagonal, and :math:`\bar g_{li}` the example's gradient,
    averaged over the segment's checkpoints. One segment is an influence function whose damping follows from the
    learning rates; a long one is an influence function without damping.

    Adam and AdamW are taken as gradient descent whose preconditioner P, 1 over (the root of the mean squares + eps), is
    frozen at the segment's middle checkpoint: then :math:`S = P^{1/2} e^{-T M} P^{-1/2}` and
    :math:`F = P^{1/2} (I - e^{-T M}) M^{-1} P^{1/2}` with :math:`M = P^{1/2} C P^{1/2}`, to which AdamW's decoupled
    weight decay is added. Learning rates that differ between parameter groups are part of P.

    Source: Bae, Lin, Lorraine, Grosse. Training Data Attribution via Approximate Unrolled Differentiation.
    NeurIPS 2024.
    Needs: checkpoints with learning rates; under Adam with the optimizer's state, as `Influence` writes them.
    Units: query loss.
    Cost: one curvature a segment (kept with the run), one backward pass an example and checkpoint; queries written out.
    Departs from the paper: a segment's curvature and preconditioner are those at its middle checkpoint, not averages
    over all. ``EKFAC`` takes P as its diagonal in each layer's Kronecker eigenbasis; ``ExactGGN`` takes it as it is.

    Args:
        segments: how many; no more than there are checkpoints behind the initial one.
        curvature: ``EKFAC()``, or ``ExactGGN()`` for small models; its ``damping``, None here for none, is added.

    Raises:
        ValueError: fewer than one segment; an optimizer other than SGD, Adam and AdamW; `maximize=True`.
        MissingEvidence: no steps between checkpoints; checkpoints of Adam without its state.
        TypeError: a curvature whose eigenvalues are not known.
    """

    segments: int = 3
    curvature: Curvature = field(default_factory=EKFAC)
    needs: ClassVar[Evidence] = Evidence.CHECKPOINTS

    def __post_init__(self) -> None:
        check_integer("segments", self.segments)
        if not isinstance(self.curvature, Curvature) or not self.curvature.has_eigenvalues:
            raise TypeError(
                f"Expected `curvature` to be one whose eigenvalues are known, `EKFAC()` or `ExactGGN()`, got "
                f"{self.curvature!r}."
            )

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]."""
        run = setting.state(self, _SegmentedRun)
        if not run.segments:
            run.segments = self._segments(setting)
        if run.queries is not queries:  # before any stage is visited: it is done at the weights of other checkpoints
            run.queries, run.directions = queries, self._directions(setting, queries, run.segments)
        return super().score(setting, queries)

    def query_side(self, stage: Stage, queries: Queries) -> QueryGradients:
        """What the gradients in the stage's segment are multiplied with."""
        run = stage.setting.state(self, _SegmentedRun)
        return run.directions[run.segment_at(stage)]

    def product(self, stage: Stage, query: QueryGradients, block: TrainBlock) -> Tensor:
        """[query, example]."""
        run = stage.setting.state(self, _SegmentedRun)
        averaged = len(run.segments[run.segment_at(stage)].checkpoints)
        return query.dot(block.gradients) / (stage.setting.n_train * averaged)

    def _segments(self, setting: Setting) -> list[SourceSegment]:
        """Runs of checkpoints of nearly the same number.

        Raises:
            MissingEvidence: no steps lie between the checkpoints.
            ValueError: see the class.
        """
        positions = self.positions(setting.trajectory)
        assert setting.trajectory is not None
        check_optimizers(setting.trajectory)
        count = min(self.segments, len(positions))
        if count < self.segments:
            setting.note(f"There are {count} segments: the fit has no more checkpoints behind its initial weights")
        ends = [round((k + 1) * len(positions) / count) for k in range(count)]
        found, before = [], torch.zeros((), dtype=torch.float64)
        for first, last in zip([0, *ends], ends, strict=False):
            until = self._reach(setting, positions[last - 1])
            run = range(positions[first], positions[last - 1] + 1)
            shrunk = torch.stack([setting.trajectory.shrinkage(k) for k in run]).sum(0)
            found.append(SourceSegment(tuple(positions[first:last]), until - before, shrunk))
            before = until
        reaches = ", ".join(_shown(segment.reach) for segment in found)
        setting.note(f"{count} segments with sums of learning rates / (1 - momentum) of {reaches}")
        if setting.trajectory.adaptive:
            setting.note("Adam's preconditioner is frozen in each segment, at that of its middle checkpoint")
        return found

    def _reach(self, setting: Setting, position: int) -> Tensor:
        reach = reach_at(setting, position)
        if reach is None:
            raise MissingEvidence(
                "`SOURCE` needs checkpoints behind some steps, got the initial weights alone. Fit with "
                "`Trainer(callbacks=[Influence()])`, or use `GradientDot()`."
            )
        return reach

    def _directions(self, setting: Setting, queries: Queries, segments: list[SourceSegment]) -> list[DenseQueries]:
        """For each segment the queries' gradients, carried back through the segments after it."""
        carried = setting.final().gradients(queries).dense()
        directions: list[DenseQueries] = []
        for segment in reversed(segments):
            (stage,) = setting.stages([segment.middle])
            prepared = prepared_at(self.curvature, setting, stage)
            for note in prepared.notes:
                setting.note(note)
            descent = descent_at(setting, stage, self.curvature.damping or 0.0, segment.reach, segment.shrunk)
            moved, carried = self.curvature.descend(prepared, carried, setting, descent)
            directions.append(DenseQueries(moved, setting.engine.groups))
        return directions[::-1]

    # ---- the record ---------------------------------------------------------------------------------------------

    def queries_at_once(self, setting: Setting) -> int | None:
        """As many as the curvature holds written out, for each segment."""
        most = self.curvature.at_once(setting)
        return None if most is None else max(1, most // (self.segments + 1))

    def preparation_seconds(self, setting: Setting, vectors: int) -> float:
        """The curvature of every segment, shared out among the checkpoints."""
        return self.curvature.seconds(setting, vectors) * self.segments / len(self.positions(setting.trajectory))

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """All but the initial one."""
        return stage_positions(trajectory)

    def unit(self, setting: Setting) -> str:
        """Loss."""
        return "loss"


@dataclass
class _SegmentedRun:
    """What is kept from one tile and block of queries to the next.

    Args:
        segments: of the run.
        queries: those that ``directions`` are of.
        directions: of these queries, one for each segment.
    """

    segments: list[SourceSegment] = field(default_factory=list)
    queries: Queries | None = None
    directions: list[DenseQueries] = field(default_factory=list)

    def segment_at(self, stage: Stage) -> int:
        """Which segment a checkpoint is in."""
        return next(k for k, segment in enumerate(self.segments) if stage.position in segment.checkpoints)


def _shown(reach: Tensor) -> str:
    """One number, or the smallest and the largest of those of the parameter groups."""
    least, most = float(reach.min()), float(reach.max())
    return f"{most:.3g}" if most - least <= 1e-6 * abs(most) else f"{least:.3g} to {most:.3g}"
