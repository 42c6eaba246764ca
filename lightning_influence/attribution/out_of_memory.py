"""Goes on with smaller blocks of examples where memory does not suffice."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from lightning_influence.data.examples import Examples
from lightning_influence.processes import Processes
from lightning_influence.setting.setting import Setting

T = TypeVar("T")
# Of errors that have no type of their own, from an allocator or from cuBLAS and the like.
_TEXTS = (
    *("out of memory", "not enough memory", "can't allocate memory", "_STATUS_ALLOC_FAILED"),
    *("CUBLAS_STATUS_NOT_INITIALIZED", "unable to find an engine"),  # what cuBLAS and cuDNN say where they lack memory
)


def in_memory(work: Callable[[], T], setting: Setting, processes: Processes) -> T:
    """What the work returns; whenever memory runs out, blocks of examples are halved and it starts again.

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
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = max(processes.gathered(max(min(read.block_size, count) for read, count in _read(setting))))
            if size == 1:
                raise
            error.__traceback__ = None  # all processes know the error, which would keep what is in memory
        _halve(setting, size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator, one of its libraries, the CPU or Python could not allocate memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in _TEXTS)


def _read(setting: Setting) -> list[tuple[Examples, int]]:
    """The datasets that are read in blocks, each with how many of its examples are."""
    queries = setting.queries
    return [(setting.examples, len(setting.ids))] + ([] if queries is None else [(queries.examples, len(queries.ids))])


def _halve(setting: Setting, size: int) -> None:
    for examples, _ in _read(setting):
        examples.close()
        examples.block_size = min(examples.block_size, size // 2)
    gc.collect()
    empty = getattr(torch.get_device_module(setting.zeros().device), "empty_cache", None)
    if empty is not None:
        empty()
    told = "Memory did not suffice for blocks of"
    before = next((note for note in setting.notes if note.startswith(told)), None)
    most = size if before is None else int(before.removeprefix(told).split()[0])
    if before is not None:
        setting.notes.remove(before)
    setting.note(f"{told} {most} examples: they were scored in blocks of {size // 2} (`batch_size=`).")
