"""The record of a fit in a few words."""

from typing import TYPE_CHECKING

from lightning_influence.wording import counted

if TYPE_CHECKING:
    from lightning_influence.trajectory.trajectory import Trajectory


def in_words(trajectory: "Trajectory") -> str:
    """Where it is, the fit, its checkpoints, and what a reader must know."""
    where = "of .ckpt files" if trajectory.path is None else f"in {str(trajectory.path)!r}"
    first, last = (trajectory.checkpoints[i].step for i in (0, -1))
    count = counted(len(trajectory.checkpoints), "checkpoint")
    steps = f"step {last}" if first == last else f"steps {first} to {last}"
    notes = [f"\n  Note: {note}" for note in trajectory.notes]
    return f"Trajectory {where}: {the_fit(trajectory)}; {count} ({steps})" + "".join(notes)


def the_fit(trajectory: "Trajectory") -> str:
    """Its length, its data, and whether it ran to its end."""
    known = trajectory.dataset_size
    data = "" if known is None else f" on {counted(known, 'training example')}"
    steps = counted(len(trajectory.steps), "step") if len(trajectory.steps) else "unrecorded steps"
    return f"a fit of {steps}{data}, {'finished' if trajectory.finished else 'not finished'}"
