"""What a fit wrote to disk: checkpoints, learning rates, batch order, optimizer options."""

from lightning_influence.trajectory.checkpoint import BestFile, Checkpoint, SavedState
from lightning_influence.trajectory.fitting import fitted_checkpoint, fitted_trajectory, other_model, other_shapes
from lightning_influence.trajectory.lightning_files import LightningCheckpoint, best_of, deployed
from lightning_influence.trajectory.trajectory import Trajectory

__all__ = [
    "BestFile",
    "Checkpoint",
    "LightningCheckpoint",
    "SavedState",
    "Trajectory",
    "best_of",
    "deployed",
    "fitted_checkpoint",
    "fitted_trajectory",
    "other_model",
    "other_shapes",
]
