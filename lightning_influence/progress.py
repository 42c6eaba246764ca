"""Progress bars in the style of the Trainer's own."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm


@contextlib.contextmanager
def progress(trainer: Any, total: int, label: str, unit: str = "example") -> Iterator[Callable[[int], Any]]:
    """Yields a function to call with the number of training examples (or other units) just done.

    Nothing is shown where the Trainer shows no progress bar, or, without a Trainer, where stderr is no terminal.
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
