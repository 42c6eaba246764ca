"""A captured fit run again: step by step, under other weights of its examples, and backwards."""

from lightning_influence.replay.many import run_many
from lightning_influence.replay.replay import DriftError, Moment, Replay
from lightning_influence.replay.standing import Standing

__all__ = ["DriftError", "Moment", "Replay", "Standing", "run_many"]
