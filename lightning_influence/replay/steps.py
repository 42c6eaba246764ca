"""The steps of a captured fit: their micro-batches, optimizer options and random states."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_influence.numerics.clipping import ByNorm, ByValue, Clipping
from lightning_influence.numerics.optimizers import UpdateStep, update_step
from lightning_influence.trajectory import Checkpoint, Trajectory
from lightning_influence.trajectory.files import ACCELERATOR
from lightning_influence.types import MissingEvidence

_AGAIN = "Fit again with `Trainer(callbacks=[Influence(...)])`, or use `TracInCP()`, which needs checkpoints only."


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass of the fit.

    Args:
        ids: the examples in their order.
        random: states before the forward pass of the random generators that it drew from.
        read: states before its examples were read of the random generators that this drew from.
        drawn: the examples of the whole batch, whose number or tokens divide a mean; None: ``ids``, none is left out.
        index: ``batch_idx``; 0 where the run does not know it.
    """

    ids: tuple[int, ...]
    random: Mapping[str, bytes]
    read: Mapping[str, bytes] = field(default_factory=dict)
    drawn: tuple[int, ...] | None = None
    index: int = 0


@dataclass(frozen=True)
class Step:
    """One step of an optimizer.

    Args:
        made: number of optimizer steps up to and including this one.
        epoch: number of the epoch.
        batches: their gradients were added up.
        divisor: divides the loss of every micro-batch (gradient accumulation).
        moves: the optimizer's rule, and its options by parameter.
        clipping: how gradients were clipped, or None.
        left_out: examples of weight 0, which do not change the step.
    """

    made: int
    epoch: int
    batches: tuple[MicroBatch, ...]
    divisor: int
    moves: UpdateStep
    clipping: Clipping | None
    left_out: tuple[MicroBatch, ...] = ()


@dataclass(frozen=True)
class Segment:
    """The steps between two checkpoints.

    Args:
        start: the captured state before them.
        end: the captured state after them.
        steps: in their order.
    """

    start: Checkpoint
    end: Checkpoint
    steps: tuple[Step, ...]


def segments_of(trajectory: Trajectory | None) -> list[Segment]:
    """Splits a captured fit at its checkpoints that hold the optimizer's state, from which a replay can start.

    Raises:
        MissingEvidence: no captured fit with steps and batch order; a step without a record; the module clips gradients
            itself.
        ValueError: an optimizer without a rule.
    """
    if trajectory is None or len(trajectory.checkpoints) < 2 or len(trajectory.steps) == 0:
        got = "none"
        if trajectory is not None:
            got = f"{len(trajectory.checkpoints)} checkpoints and {len(trajectory.steps)} recorded steps"
        raise MissingEvidence(
            f"Expected a fit whose steps were captured, so that it can be replayed, got {got}. {_AGAIN}"
        )
    if not trajectory.has_batch_order:
        raise MissingEvidence(
            "Expected the ids of the examples in every step, got steps without them (the run's notes: "
            f"{'; '.join(trajectory.notes) or 'none'}). Pass `Influence(sample_id=)`, which identifies the examples of "
            "a batch, and fit again."
        )
    steps, (*earlier, last) = _steps(trajectory), trajectory.checkpoints
    ends = [*(checkpoint for checkpoint in earlier if checkpoint.whole), last]
    return [Segment(start, end, _between(steps, start.step, end.step)) for start, end in itertools.pairwise(ends)]


def _steps(trajectory: Trajectory) -> dict[int, Step]:
    moves: dict[tuple[Any, ...], UpdateStep] = {}
    steps = {}
    columns = ("step", "epoch", "ids", "rng", "read_rng", "divisor", "lr", "settings", "clip", "skipped", "batch_idx")
    for row in trajectory.steps.select(columns).to_pylist():
        if row["skipped"]:
            continue
        entry = trajectory.settings[row["settings"]]
        key = row["settings"], *row["lr"]
        if key not in moves:
            moves[key] = update_step(entry, row["lr"])
        none, zeros = [None] * len(row["ids"]), [0] * len(row["ids"])
        batches = tuple(
            MicroBatch(tuple(ids), captured(drew), captured(read), index=index)
            for ids, drew, read, index in zip(
                row["ids"], row["rng"] or none, row["read_rng"] or none, row["batch_idx"] or zeros, strict=True
            )
        )
        clipping = _clipping(entry, row["clip"])
        steps[row["step"]] = Step(row["step"], row["epoch"], batches, row["divisor"], moves[key], clipping)
    return steps


def captured(states: Mapping[str, bytes | None] | None) -> dict[str, bytes]:
    """The random states that were recorded for a micro-batch, by generator."""
    known = {name: state for name, state in (states or {}).items() if state is not None}
    if (of_cuda := known.pop("cuda", None)) is not None:  # as earlier versions wrote it
        known[ACCELERATOR] = b"cuda:" + of_cuda
    return known


def _between(steps: Mapping[int, Step], after: int, until: int) -> tuple[Step, ...]:
    missing = [made for made in range(after + 1, until + 1) if made not in steps]
    if missing:
        raise MissingEvidence(
            f"Expected a record of every step from {after + 1} to {until}, got none of {missing[:5]!r}"
            f"{' and more' if len(missing) > 5 else ''}. {_AGAIN}"
        )
    return tuple(steps[made] for made in range(after + 1, until + 1))


def _clipping(entry: Mapping[str, Any], coefficient: float | None) -> Clipping | None:
    found = entry.get("clipping")
    if found is None:
        if coefficient is not None and coefficient < 1.0:
            raise MissingEvidence(f"Expected the limit that gradients were clipped to, got a run without it. {_AGAIN}")
        return None
    kinds = {"norm": ByNorm, "value": ByValue}
    if found["algorithm"] not in kinds:
        raise MissingEvidence(
            "Expected gradients clipped by `Trainer(gradient_clip_val=)`, got the module's own "
            f"`configure_gradient_clipping`, which cannot be replayed. {_AGAIN}"
        )
    return kinds[found["algorithm"]](found["limit"])


def examples_of(steps: Sequence[Step]) -> int:
    """The number of examples in the forward passes of some steps."""
    return sum(len(batch.ids) for step in steps for batch in (*step.batches, *step.left_out))
