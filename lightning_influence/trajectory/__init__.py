"""What a fit left on disk: checkpoints, learning rates, batch order, optimizer settings."""

from lightning_influence.trajectory.checkpoint import Checkpoint, SavedState
from lightning_influence.trajectory.trajectory import Trajectory

__all__ = ["Checkpoint", "SavedState", "Trajectory"]
