"""The checkpoints of a fit: which of them a question asks for, and their weights in the module."""

from collections.abc import Sequence

from lightning_influence.module.task import Task
from lightning_influence.trajectory import Checkpoint, SavedState, Trajectory
from lightning_influence.types import MissingEvidence


def required(trajectory: Trajectory | None) -> Trajectory:
    """The trajectory.

    Raises:
        MissingEvidence: there is none.
    """
    if trajectory is None:
        raise MissingEvidence(
            "Expected a trajectory with checkpoints and learning rates, got `trajectory=None`. Fit with "
            "`Trainer(callbacks=[Influence()])`, or load checkpoint files with `Trajectory.from_checkpoints(paths)`."
        )
    return trajectory


def stage_positions(trajectory: Trajectory | None, checkpoints: Sequence[int] | None = None) -> list[int]:
    """The given positions, sorted and non-negative; None: all but the initial weights, unless there are no others.

    Raises:
        MissingEvidence: no trajectory.
        ValueError: a position that does not exist.
    """
    steps = [checkpoint.step for checkpoint in required(trajectory).checkpoints]
    available = len(steps)
    if checkpoints is None:
        return list(range(1 if available > 1 and steps[0] == 0 else 0, available))
    wrong = [c for c in checkpoints if not -available <= c < available]
    if wrong:
        raise ValueError(f"Expected `checkpoints` to be positions in the list of {available}, got {wrong!r}.")
    return sorted({c % available for c in checkpoints})


def put_in_place(task: Task, checkpoint: Checkpoint, state: SavedState | None = None) -> None:
    """Give the module the weights of a checkpoint, and its step and epoch.

    Args:
        task: the module.
        checkpoint: whose weights.
        state: its content, where it has been read already.
    """
    state = checkpoint.load() if state is None else state
    task.load(state.parameters, state.buffers, checkpoint.step, checkpoint.epoch)
