"""Progress bars in the style of the Trainer's own; lines, where there is neither a terminal nor a notebook."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tqdm.auto import tqdm

# Seconds until the first line, and between two lines.
_FIRST, _EVERY = 5.0, 30.0


class Progress(Protocol):
    """Opens a progress bar. See ``progress``, which is one after its first argument."""

    def __call__(self, total: int, label: str, unit: str = "example") -> AbstractContextManager[Callable[[int], Any]]:
        """Opens it."""


@contextlib.contextmanager
def progress(trainer: Any, total: int, label: str, unit: str = "example") -> Iterator[Callable[[int], Any]]:
    """Yields a function to call with the number of training examples (or other units) just done.

    Nothing is shown during a fit whose Trainer shows no progress bar. Where such a Trainer has ended, and without one
    where stderr is neither a terminal nor that of a notebook (a job's log), a line is written after
    five seconds, and then every half minute.
    """
    bar = None if trainer is None else trainer.progress_bar_callback
    if trainer is not None and (bar is None or not bar.is_enabled or not trainer.is_global_zero):
        yield (lambda done: None) if _silent(trainer) else _Lines(total, label, unit)
        return
    rich = getattr(bar, "progress", None)
    if rich is not None and hasattr(rich, "add_task") and getattr(rich, "live", None) and rich.live.is_started:
        task = rich.add_task(f"[white]{label}", total=total, visible=True)
        try:
            yield lambda done: rich.update(task, advance=done)
        finally:
            rich.update(task, visible=False)
        return
    in_notebook = any("notebook" in kind.__module__ for kind in tqdm.__mro__)  # tqdm.auto found one
    if bar is None and not sys.stderr.isatty() and not in_notebook:
        yield _Lines(total, label, unit)
        return
    with tqdm(total=total, desc=label, unit=unit, leave=False) as shown:
        yield shown.update


@contextlib.contextmanager
def telling(trainer: Any, what: str) -> Iterator[None]:
    """Writes lines on work that has no pieces to count: first after five seconds, then every half minute.

    They go to stderr, also beside a progress bar; nothing is shown during a fit whose Trainer shows no progress bar.
    """
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = _FIRST
        while not ended.wait(wait):
            print(f"{what} ({time.monotonic() - began:,.0f} s so far)", file=sys.stderr, flush=True)
            wait = _EVERY

    thread = None if trainer is not None and _silent(trainer) else threading.Thread(target=tell, daemon=True)
    if thread is not None:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread is not None:
            thread.join()


def _silent(trainer: Any) -> bool:
    """Whether nothing is shown: in other processes than the first, and while a Trainer without a progress bar runs."""
    bar = trainer.progress_bar_callback
    hidden = bar is None or not bar.is_enabled
    return not trainer.is_global_zero or (hidden and trainer.state.status == "running")


@contextlib.contextmanager
def no_progress(total: int, label: str, unit: str = "example") -> Iterator[Callable[[int], Any]]:
    """Shows nothing."""
    yield lambda done: None


class _Lines:
    """Writes to stderr how much is done and how long the rest will take: first after five seconds, then more rarely."""

    def __init__(self, total: int, label: str, unit: str) -> None:
        self._total, self._label, self._unit = total, label, unit
        self._done = self._done_first = 0
        self._started = time.monotonic()
        self._next = self._started + _FIRST

    def __call__(self, done: int) -> None:
        """So many more are done."""
        self._done += done
        now = time.monotonic()
        rest = self._left(now)
        if not self._done_first:  # the first piece's time is also that of what was prepared for all of them
            self._started, self._done_first = now, self._done
        if now < self._next or not 0 < self._done < self._total:
            return
        self._next = now + _EVERY
        print(f"{self._label}: {self._done:,} of {self._total:,} {self._unit}s{rest}", file=sys.stderr, flush=True)

    def _left(self, now: float) -> str:
        """How long the rest will take, once more than the first piece or a hundredth is done."""
        done = self._done - self._done_first
        if not done or (not self._done_first and 100 * done < self._total):
            return ""
        seconds = (now - self._started) / done * max(0, self._total - self._done)
        return f", about {seconds:,.0f} s left"
