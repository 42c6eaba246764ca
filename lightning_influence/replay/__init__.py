"""Replays a captured fit: step by step, backwards, and under other weights of its examples."""

from lightning_influence.replay.adjoint import adjoint
from lightning_influence.replay.replay import MAX_DRIFT, DriftError, Replay, ReplayedStep
from lightning_influence.replay.training_state import TrainingState
from lightning_influence.replay.vectorized import run_many

__all__ = [
    "MAX_DRIFT",
    "DriftError",
    "Replay",
    "ReplayedStep",
    "TrainingState",
    "adjoint",
    "run_many",
]
