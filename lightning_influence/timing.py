"""Timing of a piece of work, for cost estimates."""

import time
from collections.abc import Callable
from typing import Any

from lightning_influence.devices import synchronize


def timed(work: Callable[[], Any]) -> float:
    """Runs the work twice and returns the seconds of the faster run."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
