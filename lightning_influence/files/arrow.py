"""Tensors as Arrow files, written atomically and memory-mapped back without a copy; tables of scores."""

import itertools
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import torch
from torch import Tensor

from lightning_influence.files.atomic import whole
from lightning_influence.files.sealed import DamagedFileError, SealedFile, seal

FilePath: TypeAlias = str | os.PathLike[str]
Columns: TypeAlias = Mapping[str, Tensor]
"""Name to [row] or [row, width] tensors, all with the same number of rows."""

FORMAT = 2
"""1: without checksums."""
_KEY = b"lightning_influence"
_DTYPES = {pa.float32(): torch.float32, pa.float64(): torch.float64, pa.int64(): torch.int64}


def write_file(
    path: FilePath, kind: str, columns: Columns, metadata: Mapping[str, Any], overwrite: bool = False
) -> Path:
    """Write tensors as the columns of one Arrow IPC file, straight from their memory.

    The file appears under its name once it is complete; after a crash, the previous file is still there.

    Args:
        path: The file; its folder is created if it is missing.
        kind: What the file holds; `read_file` checks it.
        columns: Name to [row] or [row, width] tensors of float32, float64 or int64, all with the same number of rows.
        metadata: JSON-serialisable; stored in the schema.
        overwrite: Replace an existing file.

    Returns:
        The path.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        IsADirectoryError: `path` is a folder.
    """
    return write_batches(path, kind, [columns], metadata, overwrite)


def write_batches(
    path: FilePath, kind: str, batches: Iterable[Columns], metadata: Mapping[str, Any], overwrite: bool = False
) -> Path:
    """Write batches of rows as they are produced: only one of them is in memory at a time.

    Args:
        path: As in `write_file`.
        kind: As in `write_file`.
        batches: At least one; each like `columns` of `write_file`, with the same names, types and widths.
        metadata: As in `write_file`.
        overwrite: As in `write_file`.

    Returns:
        The path.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    check_absent(path, overwrite)
    head = json.dumps({"format": FORMAT, "kind": kind, **metadata})
    records = (pa.record_batch({name: _to_arrow(tensor) for name, tensor in batch.items()}) for batch in batches)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        first, starts = next(records), []
        with pa.ipc.new_file(file, first.schema.with_metadata({_KEY: head.encode()})) as writer:
            for record in itertools.chain((first,), records):
                starts.append(file.tell())
                writer.write_batch(record)
        seal(file, starts)
    return path


def check_absent(path: Path, overwrite: bool = False) -> None:
    """Check that a file may be written at a path.

    Raises:
        FileExistsError: There is one, and ``overwrite`` is False.
        IsADirectoryError: It is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"Expected `path` to name a file, got the folder {str(path)!r}. Add a file name to it.")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"Expected no file at {str(path)!r}, found one. Pass `overwrite=True` or choose another path."
        )


@dataclass(frozen=True)
class ArrowFile:
    """A file written by `write_batches`, mapped into memory: pages are read on access.

    The tensors are views of the file's pages, private to this process: writing to them does not change the file.

    Args:
        kind: What it holds.
        batches: The columns of every batch. Their values are verified by `check` only.
        metadata: As passed to `write_batches`.
        file: The mapped pages and their checksums.
    """

    kind: str
    batches: list[dict[str, Tensor]]
    metadata: dict[str, Any]
    file: SealedFile

    def columns(self) -> dict[str, Tensor]:
        """The columns of all batches together; those of several batches are copied."""
        if len(self.batches) == 1:
            return self.batches[0]
        return {name: torch.cat([batch[name] for batch in self.batches]) for name in self.batches[0]}

    def check(self, *tensors: Tensor) -> None:
        """Compare the checksums of some of the mapped tensors, or without any, of the whole file.

        Raises:
            ValueError: The values are not those that were written; the message names the file.
        """
        if not tensors:
            self.file.check()
        for tensor in tensors:
            self.file.check_tensor(tensor)


def read_file(path: FilePath, kinds: Sequence[str]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The kind, the columns and the metadata of a file, as passed to `write_file`; see `read_batches`."""
    found = read_batches(path, kinds)
    return found.kind, found.columns(), found.metadata


def read_batches(path: FilePath, kinds: Sequence[str]) -> ArrowFile:
    """Read a file written by `write_batches`, with all its checksums.

    Args:
        path: The file.
        kinds: The kinds that the caller can read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, not written by this package, of another kind or of a later format.
    """
    found = map_batches(path, kinds)
    found.check()
    return found


# Where a folder has files of scores: its own, those of a run, and those of all runs.
_PLACES = ("*.arrow", "scores/*.arrow", "run-*/scores/*.arrow")
_LISTED = 12


def map_batches(path: FilePath, kinds: Sequence[str]) -> ArrowFile:
    """Like `read_batches`, but the caller calls `ArrowFile.check` before it uses values.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, not written by this package, of another kind or of a later format.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(str(file) for below in _PLACES for file in path.glob(below))
        listed = ", ".join(map(repr, files[:_LISTED])) + f" and {len(files) - _LISTED} more" * (len(files) > _LISTED)
        raise FileNotFoundError(
            f"Expected a file of scores, got the folder {str(path)!r}, "
            + (f"in which there are {listed}. Load one of them." if files else "without any. `save` writes one.")
        )
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of scores at {str(path)!r}, found none. `save` writes one.")
    try:
        file = SealedFile(path)
        whole = pa.py_buffer(file.pages)
        reader = pa.ipc.open_file(whole)
        head = json.loads((reader.schema.metadata or {})[_KEY])
        _refuse_other(path, head, kinds)
        if head["format"] > 1 and not file.sealed:
            raise ValueError("its table of checksums is missing")
        records = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for record in records:
            record.validate(full=True)
        batches = [
            {name: _to_tensor(record[name], file.pages, whole.address) for name in reader.schema.names}
            for record in records
        ]
    except _WrongFileError as error:
        raise ValueError(str(error)) from None
    except DamagedFileError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"Expected {str(path)!r} to be a file written by `save`, but it is damaged, cut short or of another origin "
            f"({type(error).__name__}: {error}). Write it again."
        ) from error
    kind = head.pop("kind")
    return ArrowFile(kind, batches, {name: value for name, value in head.items() if name != "format"}, file)


def pack_ids(ids: Tensor | None) -> Any:
    """Ids as JSON: start and stop where they are consecutive, otherwise a list; None stays None."""
    if ids is None:
        return None
    first, count = int(ids[0]), ids.numel()
    if torch.equal(ids, torch.arange(first, first + count)):
        return {"start": first, "stop": first + count}
    return ids.tolist()


def unpack_ids(packed: Any) -> Any:
    """The inverse of `pack_ids`: a tensor or None."""
    if isinstance(packed, Mapping):
        return torch.arange(packed["start"], packed["stop"])
    return None if packed is None else torch.tensor(packed, dtype=torch.int64)


def stream(columns: Mapping[str, pa.DataType], rows: Callable[[int], Columns], n: int) -> pa.RecordBatchReader:
    """A table whose batches are produced while it is read.

    Args:
        columns: Names and types, in order.
        rows: Returns the i-th batch: a [row] tensor for every name.
        n: How many batches there are.
    """
    schema = pa.schema(list(columns.items()))

    def batches() -> Iterator[pa.RecordBatch]:
        for i in range(n):
            made = rows(i)
            yield pa.record_batch([_to_arrow(made[name]) for name in columns], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def as_rows(table: pa.Table, **more: Callable[[Mapping[str, Any]], Any]) -> tuple[list[str], list[list[Any]]]:
    """Column names and rows of a small table, with further columns computed from each row."""
    rows = table.to_pylist()
    names = [*table.column_names, *more]
    return names, [[*row.values(), *(make(row) for make in more.values())] for row in rows]


class _WrongFileError(Exception):
    """A valid file of this package, but of another kind or a later format."""


def _refuse_other(path: Path, head: Mapping[str, Any], kinds: Sequence[str]) -> None:
    if head["format"] > FORMAT:
        raise _WrongFileError(
            f"Expected {str(path)!r} to be of format {FORMAT} or earlier, got {head['format']!r}. "
            "Update `lightning-influence` to read it."
        )
    if head["kind"] not in kinds:
        owner = "SelfScores" if head["kind"] == "self_scores" else "Scores"
        raise _WrongFileError(f"Expected {str(path)!r} to hold {kinds[0]}, got {head['kind']}. Use `{owner}.load`.")


def _to_arrow(tensor: Tensor) -> pa.Array:
    flat = pa.array(tensor.contiguous().reshape(-1).numpy())
    return flat if tensor.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, tensor.shape[1])


def _to_tensor(column: pa.Array, pages: mmap.mmap, start: int) -> Tensor:
    nested = pa.types.is_fixed_size_list(column.type)
    flat = column.flatten() if nested else column
    offset = flat.buffers()[1].address - start + flat.offset * flat.type.byte_width
    tensor = torch.frombuffer(pages, dtype=_DTYPES[flat.type], count=len(flat), offset=offset)
    return tensor.view(len(column), column.type.list_size) if nested else tensor
