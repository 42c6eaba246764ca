"""Timing of pieces of work, and what estimates of the whole are made of."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_influence.devices import synchronize

clock = time.perf_counter
"""Seconds. Benchmarks and tests count those of the CPU in its place."""

# A piece of work that takes this many seconds is timed once only.
_LONG = 0.1


class Work(NamedTuple):
    """One kind of work in an estimate.

    Args:
        what: it is.
        times: how often it is done.
        each: the seconds that it takes each time.
    """

    what: str
    times: float
    each: float

    @property
    def seconds(self) -> float:
        """In total."""
        return self.times * self.each

    def __str__(self) -> str:
        return f"{self.what}: {self.seconds:.3g} s ({self.times:.6g} of {self.each:.3g} s)"


def timed(work: Callable[[], Any]) -> float:
    """The seconds of the faster of two runs of the work; long work is run once."""
    first = seconds_of(work)
    return first if first > _LONG else min(first, seconds_of(work))


def seconds_of(work: Callable[[], Any]) -> float:
    """The seconds of one run of the work, until the device has finished it."""
    synchronize()
    start = clock()
    work()
    synchronize()
    return clock() - start
