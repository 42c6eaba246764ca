"""A few steps of a fit, timed for an estimate of a walk through all of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_influence.replay.replay import Replay
from lightning_influence.replay.steps import Step, examples_of
from lightning_influence.replay.training_state import TrainingState
from lightning_influence.timing import seconds_of, timed

# Steps of the longer of the two walks that are compared.
_STEPS = 5


class FewSteps(Replay):
    """Some steps of a fit from the captured state at the start of their segment, as if they were the fit.

    Where they lead is not compared with the fit.
    """

    @classmethod
    def of(cls, replay: Replay, number: int, steps: tuple[Step, ...]) -> "FewSteps":
        """Steps of the segment of that number."""
        some = cls.__new__(cls)
        segments = [replace(replay.segments[number], steps=steps)]
        some.__dict__ |= {**replay.__dict__, "segments": segments, "drifts": {}}
        return some

    def compare(self, segment: int, here: TrainingState) -> None:
        """No comparison."""


def seconds_of_walk(replay: Replay, walk: Callable[[Replay], Any]) -> float:
    """Estimate the seconds of a walk through a whole fit, by a few walks through some of its steps, or a segment's.

    Args:
        replay: the fit.
        walk: called with a replay of a few steps.
    """
    number = max(range(len(replay.segments)), key=lambda k: len(replay.segments[k].steps))
    steps, whole = replay.segments[number].steps, examples_of(replay.steps)

    def took(start: int, count: int, by: Callable[[Callable[[], Any]], float] = timed) -> tuple[float, int]:
        some = steps[start : start + count] or steps[:count]
        return by(lambda: walk(FewSteps.of(replay, number, some))), examples_of(some)

    whole_segment = len(steps) <= 1 + _STEPS  # where a segment starts takes a good part of the time
    count = len(steps) if whole_segment else 1
    first, _ = took(0, count, by=seconds_of)  # with what is looked at only once
    short, size = took(0 if whole_segment else 1, count)
    each = short / max(1, size)
    if not whole_segment:
        long, longer = took(2, _STEPS)
        if longer > size and long > short:  # by what is added, as a start takes time too
            each = min((long - short) / (longer - size), long / longer)
    return max(first, short) + each * max(0, whole - size)
