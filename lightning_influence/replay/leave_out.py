"""The captured fit as it would have gone without some examples, by whose weights it is still differentiated."""

import copy
from dataclasses import replace

from torch import Tensor

from lightning_influence.replay.replay import Replay
from lightning_influence.replay.steps import MicroBatch, Segment, Step


def without(replay: Replay, left_out: Tensor) -> Replay:
    """The same fit with a weight of 0 for some examples: the divisors of their batches stay.

    Args:
        replay: the fit.
        left_out: [train] bool.

    Returns:
        A replay that starts where the fit started and is compared with no later checkpoint.

    Raises:
        ValueError: forward passes that cannot be repeated for a part of a batch.
    """
    if replay.forward.joint:
        raise ValueError(
            "Expected `runs=1` where `loss=` gives the losses of joint batches, whose examples may change one "
            "another's: a fit without some of them is another question. Leave `loss` or `runs` out."
        )
    if any(batch.random or batch.read for step in replay.steps for batch in step.batches):
        raise ValueError(
            "Expected `runs=1` where training draws random numbers (dropout, augmentation): a part of a batch would "
            "draw others. Leave `runs` out."
        )
    gone = set(left_out.nonzero()[:, 0].tolist())
    other = copy.copy(replay)
    other.segments = [_segment(segment, gone) for segment in replay.segments]
    other.forward = replay.forward.again()
    other.whole = False
    return other


def _segment(segment: Segment, gone: set[int]) -> Segment:
    return replace(segment, steps=tuple(_step(step, gone) for step in segment.steps))


def _step(step: Step, gone: set[int]) -> Step:
    kept = [_part(batch, [i for i in batch.ids if i not in gone]) for batch in step.batches]
    left = [_part(batch, [i for i in batch.ids if i in gone]) for batch in step.batches]
    return replace(
        step, batches=tuple(batch for batch in kept if batch.ids), left_out=tuple(batch for batch in left if batch.ids)
    )


def _part(batch: MicroBatch, ids: list[int]) -> MicroBatch:
    return replace(batch, ids=tuple(ids), size=len(batch.ids))
