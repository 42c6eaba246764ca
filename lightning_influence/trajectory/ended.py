"""A trajectory as if the fit had ended with one checkpoint."""

from dataclasses import replace

import pyarrow.compute as pc

from lightning_influence.trajectory.checkpoint import Checkpoint
from lightning_influence.trajectory.columns import number
from lightning_influence.trajectory.trajectory import Trajectory


def ended_with(trajectory: Trajectory, checkpoint: Checkpoint) -> Trajectory:
    """The fit up to the step of a checkpoint, which takes the place of the last. What it wrote beside is not used."""
    last = trajectory.checkpoints[-1].step
    known = 0 < checkpoint.step < last
    if not known:
        checkpoint = replace(checkpoint, step=last, epoch=trajectory.checkpoints[-1].epoch)
    earlier = tuple(c for c in trajectory.checkpoints if c.step < checkpoint.step)
    rates, steps = trajectory._stored_rates, trajectory.steps
    return replace(
        trajectory,
        path=None,
        checkpoints=(*earlier, checkpoint),
        steps=steps.filter(pc.less_equal(steps["step"], number(checkpoint.step))) if known else steps,
        _stored_rates=None if rates is None else rates[: len(earlier) + 1],
    )
