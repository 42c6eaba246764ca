"""A captured fit run again: step by step, under other weights of its examples, and backwards."""

from lightning_influence.replay.adjoint import adjoint
from lightning_influence.replay.many import run_many
from lightning_influence.replay.replay import MAX_DRIFT, DriftError, Moment, Replay
from lightning_influence.replay.scoring import Replayed
from lightning_influence.replay.standing import Standing

__all__ = [
    "MAX_DRIFT",
    "DriftError",
    "Moment",
    "Replay",
    "Replayed",
    "Standing",
    "adjoint",
    "run_many",
]
