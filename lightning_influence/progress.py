"""Progress of long work, shown the way the Trainer shows its own."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm


@contextlib.contextmanager
def progress(trainer: Any, total: int, label: str, unit: str = "example") -> Iterator[Callable[[int], Any]]:
    """Yields a function that is told how many training examples (or other units) are done.

    Nothing is shown where the Trainer shows nothing, or without a Trainer where nobody looks at a terminal.
    """
    bar = None if trainer is None else trainer.progress_bar_callback
    if trainer is not None and (bar is None or not bar.is_enabled or not trainer.is_global_zero):
        yield lambda done: None
        return
    rich = getattr(bar, "progress", None)
    if rich is not None and hasattr(rich, "add_task") and getattr(rich, "live", None) and rich.live.is_started:
        task = rich.add_task(f"[white]{label}", total=total, visible=True)
        try:
            yield lambda done: rich.update(task, advance=done)
        finally:
            rich.update(task, visible=False)
        return
    hidden = bar is None and not sys.stderr.isatty()
    with tqdm(total=total, desc=label, unit=unit, leave=False, disable=hidden) as shown:
        yield shown.update
