"""How long a piece of work takes, for estimates of what is to come."""

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(work: Callable[[], Any]) -> float:
    """Seconds of the faster of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
