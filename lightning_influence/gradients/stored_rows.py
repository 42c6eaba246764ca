"""The final layer's inputs and output gradients for all training examples, in a file."""

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from lightning_influence.data.examples import Examples
from lightning_influence.files.arrow import read_batches, write_batches
from lightning_influence.gradients.final_layer import Head, HeadRows, refuse_non_finite, rows_on_host
from lightning_influence.module.random_state import seed_for
from lightning_influence.numerics.subsets import evenly_spread

# Stored rows that are computed again, to verify that they are of the same module, data and loss.
_COMPARED = 8
# Bytes of rows that are copied from a device at once.
_AT_ONCE = 2**24


def head_rows(head: Head, examples: Examples, path: Path, done: Callable[[int], Any]) -> list[HeadRows]:
    """The final layer's rows for all training examples, memory-mapped from an Arrow file.

    The file is written if it is missing, damaged, or holds rows of other weights, data or another loss; ``done`` is
    called with the number of examples that were read.

    Raises:
        ValueError: features or gradients are not finite.
    """
    if path.is_file():
        stored = _read(path)
        if stored is not None and _same(head, examples, stored):
            done(len(examples))
            return stored

    def rows() -> Iterator[dict[str, Tensor]]:
        read: dict[Sequence[int], HeadRows] = {}
        for block in examples.blocks():
            seed_for(block.start)
            read[block.ids] = head.read(block.batch, block.size)
            done(block.size)
            last = block.start + block.size == len(examples)
            if last or sum(found.nbytes for found in read.values()) >= _AT_ONCE:
                for ids, found in zip(read, rows_on_host([*read.values()]), strict=True):
                    refuse_non_finite(found, ids)
                    yield found.columns()
                read.clear()

    write_batches(path, "features", rows(), {"head": head.name}, overwrite=True)
    stored = _read(path)
    if stored is None:
        raise OSError(
            f"Expected to read back {str(path)!r}, which was just written, got a damaged file. Check that its disk is "
            "not full."
        )
    return stored


def writable(folder: Path | None, owner: object) -> Path:
    """The folder if files can be written to it, otherwise a temporary one that is removed together with ``owner``."""
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    temporary = tempfile.TemporaryDirectory(prefix="lightning_influence_", ignore_cleanup_errors=True)
    weakref.finalize(owner, temporary.cleanup)  # by itself it would warn of a resource that was not closed
    return Path(temporary.name)


def _read(path: Path) -> list[HeadRows] | None:
    try:
        return [HeadRows(b["features"], b["outputs"], b["gradients"]) for b in read_batches(path, ["features"]).batches]
    except (ValueError, KeyError):
        return None


def _same(head: Head, examples: Examples, stored: list[HeadRows]) -> bool:
    """Whether a few examples, computed again, equal those stored."""
    if sum(len(s.features) for s in stored) != len(examples):
        return False
    ids = evenly_spread(len(examples), _COMPARED)
    batch = examples.some(ids)
    seed_for(ids[0])
    (now,) = rows_on_host([head.read(batch, len(ids))])
    for name, found in now.columns().items():
        column = ConcatDataset[Tensor]([getattr(s, name) for s in stored])
        then = torch.stack([column[i] for i in ids])
        tolerance = 1e-9 if found.dtype == torch.float64 else 1e-3
        if then.shape != found.shape or then.dtype != found.dtype:
            return False
        if float((then - found).abs().max()) > tolerance * max(float(found.abs().max()), 1e-30):
            return False
    return True
