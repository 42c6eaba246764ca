"""SOURCE: influence through a few segments of training, each with a curvature of its own (Bae et al., 2024)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.curvature import Curvature, Function
from lightning_influence.curvature.damping import diagonal_at, reach_at
from lightning_influence.curvature.ekfac import EKFAC
from lightning_influence.curvature.store import prepared_at
from lightning_influence.gradients.queries import DenseQueries
from lightning_influence.method import Evidence, Method
from lightning_influence.setting import Queries, Setting, stage_positions
from lightning_influence.trajectory import Trajectory
from lightning_influence.types import MissingEvidence


@dataclass(frozen=True)
class Segment:
    """A stretch of training whose curvature is taken as constant.

    Args:
        checkpoints: positions in the trajectory, at which gradients of training examples are averaged.
        reach: sum of the learning rates in it, over (1 - momentum).
    """

    checkpoints: tuple[int, ...]
    reach: float


@dataclass(frozen=True)
class SOURCE(Method):
    r"""How much higher a query's loss would be, had training gone on without the example, segment by segment.

    .. math:: s(q, z_i) = \frac1n \sum_l \nabla\ell(w_T, q)^\top S_L \cdots S_{l+1} F_l \, \bar g_{li}, \quad
        S_l = e^{-T_l C_l}, \; F_l = (I - S_l) C_l^{-1}

    with :math:`T_l` the sum of the segment's learning rates over (1 - momentum), :math:`C_l` the curvature of the mean
    training loss with the fit's L2 weight decay on its diagonal, and :math:`\bar g_{li}` the example's gradient,
    averaged over the segment's checkpoints. One segment is an influence function whose damping follows from the
    learning rates; a long one is an influence function without damping.

    Source: Bae, Lin, Lorraine, Grosse. Training Data Attribution via Approximate Unrolled Differentiation.
    NeurIPS 2024.
    Needs: checkpoints with learning rates.
    Units: query loss.
    Cost: one curvature a segment (kept with the run), one backward pass an example and checkpoint; queries written out.
    Departs from the paper: a segment's curvature is that at its middle checkpoint, not an average over all.

    Args:
        segments: how many; no more than there are checkpoints behind the initial one.
        curvature: ``EKFAC()``, or ``ExactGGN()`` for small models; its ``damping``, None here for none, is added.

    Raises:
        ValueError: fewer than one segment; an optimizer other than SGD; learning rates that differ between parameter
            groups.
        TypeError: a curvature whose eigenvalues are not known.
    """

    segments: int = 3
    curvature: Curvature = field(default_factory=EKFAC)
    needs: ClassVar[Evidence] = Evidence.CHECKPOINTS

    def __post_init__(self) -> None:
        if isinstance(self.segments, bool) or not isinstance(self.segments, int) or self.segments < 1:
            raise ValueError(f"Expected `segments` to be a positive whole number, got {self.segments!r}.")
        if not isinstance(self.curvature, Curvature) or not self.curvature.has_eigenvalues:
            raise TypeError(
                f"Expected `curvature` to be one whose eigenvalues are known, `EKFAC()` or `ExactGGN()`, got "
                f"{self.curvature!r}."
            )

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]."""
        segments = setting.once((self, "segments"), lambda: self._segments(setting))
        felt = queries.once((self, "felt"), lambda: self._felt(setting, queries, segments))
        total = setting.zeros(queries)
        for segment, directions in zip(segments, felt, strict=True):
            for stage in setting.stages(segment.checkpoints):
                for columns, block in stage.train():
                    total[:, columns] += directions.dot(block) / (setting.n_train * len(segment.checkpoints))
        return total

    def _segments(self, setting: Setting) -> list[Segment]:
        """Runs of checkpoints of nearly the same number.

        Raises:
            MissingEvidence: no steps lie between the checkpoints.
            ValueError: see the class.
        """
        trajectory = setting.trajectory
        positions = self.positions(trajectory)
        if trajectory is not None and trajectory.adaptive:
            raise ValueError(
                "Expected a fit by SGD, got an adaptive optimizer, whose steps are no multiples of the gradient. Use "
                '`HyDRA(mode="replay")`, or `InfluenceFunction(EKFAC())`.'
            )
        count = min(self.segments, len(positions))
        if count < self.segments:
            setting.note(f"There are {count} segments: the fit has no more checkpoints behind its initial weights")
        ends = [round((k + 1) * len(positions) / count) for k in range(count)]
        found, before = [], 0.0
        for first, last in zip([0, *ends], ends, strict=False):
            until = self._reach(setting, positions[last - 1])
            found.append(Segment(tuple(positions[first:last]), until - before))
            before = until
        reaches = ", ".join(f"{segment.reach:.3g}" for segment in found)
        setting.note(f"{count} segments with sums of learning rates / (1 - momentum) of {reaches}")
        return found

    def _reach(self, setting: Setting, position: int) -> float:
        reach = reach_at(setting, position)
        if reach is None:
            raise MissingEvidence(
                "`SOURCE` needs checkpoints behind some steps, got the initial weights alone. Fit with "
                "`Trainer(callbacks=[Influence()])`, or use `GradientDot()`."
            )
        if float(reach.max() - reach.min()) > 1e-6 * float(reach.max()):
            raise ValueError(
                f"Expected one learning rate for all parameter groups, got sums of {reach.tolist()}. Use "
                '`HyDRA(mode="replay")`, or `InfluenceFunction(EKFAC())`.'
            )
        return float(reach[0])

    def _felt(self, setting: Setting, queries: Queries, segments: list[Segment]) -> list[DenseQueries]:
        """What each segment's gradients are multiplied with: the query, carried back through the segments behind."""
        carried = setting.final().gradients(queries).dense()
        felt: list[DenseQueries] = []
        for segment in reversed(segments):
            (stage,) = setting.stages([segment.checkpoints[len(segment.checkpoints) // 2]])
            prepared = prepared_at(self.curvature, setting, stage)
            for note in prepared.notes:
                setting.note(note)
            added = diagonal_at(setting, stage, self.curvature.damping or 0.0, lambda: 0.0).total
            functions = _moved(segment.reach), _kept(segment.reach)
            moved, carried = self.curvature.apply(prepared, carried, setting, added, functions)
            felt.append(DenseQueries(moved, setting.engine.groups))
        return felt[::-1]

    # ---- the record ---------------------------------------------------------------------------------------------

    def at_once(self, setting: Setting) -> int | None:
        """As many as the curvature holds written out, for each segment."""
        most = self.curvature.at_once(setting)
        return None if most is None else max(1, most // (self.segments + 1))

    def overhead(self, setting: Setting, queries: int) -> float:
        """The curvature of every segment."""
        return self.curvature.seconds(setting, queries) * self.segments / len(self.positions(setting.trajectory))

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """All but the initial one."""
        return stage_positions(trajectory)

    def unit(self, setting: Setting) -> str:
        """Loss."""
        return "loss"


def _kept(reach: float) -> Function:
    """What is left of a change behind a segment, by eigenvalue."""
    return lambda eigenvalues: torch.exp(-reach * eigenvalues)


def _moved(reach: float) -> Function:
    """How far a constant gradient moves the weights in a segment, by eigenvalue."""

    def moved(eigenvalues: Tensor) -> Tensor:
        steep = (reach * eigenvalues).abs() > 1e-12
        safe = torch.where(steep, eigenvalues, torch.ones_like(eigenvalues))
        return torch.where(steep, -torch.expm1(-reach * safe) / safe, torch.full_like(eigenvalues, reach))

    return moved
