"""What a fit wrote to disk: checkpoints, learning rates, batch order, optimizer options."""

from lightning_influence.trajectory.checkpoint import Checkpoint, SavedState
from lightning_influence.trajectory.trajectory import Trajectory

__all__ = ["Checkpoint", "SavedState", "Trajectory"]
