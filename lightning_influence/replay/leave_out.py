"""The captured fit without some examples, which can still be differentiated with respect to their weights."""

import copy
from dataclasses import replace

from torch import Tensor

from lightning_influence.replay.replay import Replay
from lightning_influence.replay.steps import MicroBatch, Step


def without(replay: Replay, left_out: Tensor) -> Replay:
    """The same fit with a weight of 0 for some examples; the divisors of their batches do not change.

    Args:
        replay: the fit.
        left_out: [train] bool.

    Returns:
        A replay from the initial weights of the fit, which is not compared with later checkpoints.

    Raises:
        ValueError: the forward pass cannot be repeated for a part of a batch.
    """
    if replay.forward.joint:
        raise ValueError(
            "Expected `runs=1` where `loss=` gives the losses of joint batches, got more: leaving out some examples "
            "would change the losses of the others. Leave `loss` or `runs` out."
        )
    if any(batch.random or batch.read for step in replay.steps for batch in step.batches):
        raise ValueError(
            "Expected `runs=1` where training draws random numbers (dropout, augmentation), got more: a part of a "
            "batch would draw other numbers. Leave `runs` out."
        )
    removed = set(left_out.nonzero()[:, 0].tolist())
    other = copy.copy(replay)
    other.segments = [
        replace(segment, steps=tuple(_step(step, removed) for step in segment.steps)) for segment in replay.segments
    ]
    other.forward = replay.forward.copy()
    other.whole = False
    return other


def _step(step: Step, removed: set[int]) -> Step:
    kept = [_part(batch, [i for i in batch.ids if i not in removed]) for batch in step.batches]
    left = [_part(batch, [i for i in batch.ids if i in removed]) for batch in step.batches]
    return replace(
        step, batches=tuple(batch for batch in kept if batch.ids), left_out=tuple(batch for batch in left if batch.ids)
    )


def _part(batch: MicroBatch, ids: list[int]) -> MicroBatch:
    return replace(batch, ids=tuple(ids), drawn=batch.ids)
