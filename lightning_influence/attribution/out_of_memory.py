"""Goes on with smaller blocks of examples where memory does not suffice."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from lightning_influence.processes import Processes
from lightning_influence.setting.setting import Setting

T = TypeVar("T")


def in_memory(work: Callable[[], T], setting: Setting, processes: Processes) -> T:
    """What the work returns; whenever memory runs out, blocks of training examples are halved and it starts again.

    Args:
        work: what to do.
        setting: the question.
        processes: that do it together: where memory runs out in one, all of them start again.

    Raises:
        RuntimeError: memory does not suffice for one example.
    """
    while True:
        try:
            with processes.together():
                return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size = max(processes.gathered(min(setting.examples.block_size, len(setting.ids))))
            if size == 1:
                raise
            error.__traceback__ = None  # all processes know the error, which would keep what is in memory
        _halve(setting, size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the CPU could not allocate memory."""
    out = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
    return out or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _halve(setting: Setting, size: int) -> None:
    setting.examples.close()
    setting.examples.block_size = size // 2
    gc.collect()
    empty = getattr(torch.get_device_module(setting.zeros().device), "empty_cache", None)
    if empty is not None:
        empty()
    told = "Memory did not suffice for blocks of"
    before = next((note for note in setting.notes if note.startswith(told)), None)
    most = size if before is None else int(before.removeprefix(told).split()[0])
    if before is not None:
        setting.notes.remove(before)
    setting.note(f"{told} {most} training examples: they were scored in blocks of {size // 2} (`batch_size=`).")
