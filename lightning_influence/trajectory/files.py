"""The format of a run on disk: file names, the Arrow schema, atomic writes and verified reads."""

import re
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_influence.files import checked_json
from lightning_influence.files.atomic import whole
from lightning_influence.files.regular import read_regular
from lightning_influence.trajectory.manifest_checks import problems
from lightning_influence.types import MissingEvidence

FORMAT = 1
MANIFEST = "manifest.json"
BROKEN = "broken"
"""An empty file beside a manifest that could not be written again when the disk was full."""
_LARGEST = 2**26  # bytes of a manifest
BROKE_OFF = "The record ends at step"

ACCELERATOR = "accelerator"
GENERATORS = ("torch", "cuda", "python", "numpy", ACCELERATOR)

_RANDOM = pa.list_(pa.struct([pa.field(name, pa.binary()) for name in GENERATORS]))

STEPS = pa.schema(
    [
        pa.field("step", pa.int64()),  # optimizer updates made so far, over all optimizers, this one included
        pa.field("optimizer", pa.int32()),
        pa.field("epoch", pa.int64()),
        pa.field("ids", pa.list_(pa.list_(pa.int64()))),  # one list per micro-batch; null: unknown, or several loaders
        pa.field("loader_ids", pa.list_(pa.list_(pa.list_(pa.int64())))),  # micro-batch, loader: where loaders combine
        pa.field("sizes", pa.list_(pa.int64())),
        pa.field("divisor", pa.int64()),
        pa.field("lr", pa.list_(pa.float64())),
        pa.field("settings", pa.int32()),
        pa.field("clip", pa.float64()),
        pa.field("skipped", pa.bool_()),
        # state of each random generator before the forward of each micro-batch, where that forward drew from it:
        # torch's own bytes, the accelerator's behind its type ("mps:"; earlier versions: only CUDA's, in "cuda"); as
        # 32-bit words numpy's 624 keys and position, Python's position and 624 keys
        pa.field("rng", _RANDOM),
        # the same before the examples of each micro-batch were read, where reading drew (augmentation) in this process;
        # then two float64: whether numpy and Python had kept a normal number for the next call, and which
        pa.field("read_rng", _RANDOM),
        # `batch_idx` of each micro-batch, its index in the epoch; null in the runs of earlier versions
        pa.field("batch_idx", pa.list_(pa.int64())),
    ]
)


def write_atomically(path: Path, content: bytes | memoryview, durable: bool = True) -> dict[str, int]:
    """Write a file so that a reader finds the previous or the complete new one; returns size and checksum."""
    with whole(path, durable) as file:
        file.write(content)
    return {"size": len(content), "crc32": zlib.crc32(content)}


def read_verified(path: Path, size: int, crc32: int) -> bytes:
    """The content of a file listed in a manifest.

    Raises:
        MissingEvidence: the file is missing, truncated or changed.
    """
    way_out = "Load another run of this folder, or fit again."
    try:
        content = read_regular(path, size, exactly=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise MissingEvidence(f"Expected {size} bytes in the file `{path}`, got {why!r}. {way_out}") from error
    if (checksum := zlib.crc32(content)) != crc32:
        raise MissingEvidence(f"Expected checksum {crc32} of `{path}`, got {checksum}: the file is damaged. {way_out}")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """A run's manifest.

    Raises:
        MissingEvidence: there is no manifest, it is damaged, or it was written by a newer version.
    """
    path = folder / MANIFEST
    try:
        manifest = checked_json.decode(read_regular(path, _LARGEST))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise MissingEvidence(
            f"Expected a run's manifest at `{path}`, got {why!r}. Pass the folder that `Influence` wrote."
        ) from error
    if manifest is None:
        raise MissingEvidence(f"Expected a whole manifest at `{path}`, got a damaged file. Load another run of it.")
    if isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
        raise MissingEvidence(
            f"Expected a run of format {FORMAT} or older in `{folder}`, got {manifest['format']!r}."
            " Upgrade `lightning_influence`."
        )
    for problem in problems(manifest):
        raise MissingEvidence(f"Expected {problem} in the manifest `{path}`. Load another run, or fit again.")
    return manifest


def runs_in(dirpath: Path) -> list[Path]:
    """The runs of a folder, oldest first."""
    entries = dirpath.iterdir() if dirpath.is_dir() else ()
    runs = [entry for entry in entries if re.fullmatch(r"run-\d+", entry.name)]
    return sorted(runs, key=lambda run: (int(run.name.removeprefix("run-")), run))


def read_steps(folder: Path, entries: list[dict[str, Any]]) -> pa.Table:
    """The step files listed in a manifest, as one table; columns that an earlier version did not write are null."""
    contents = [read_verified(folder / entry["file"], entry["size"], entry["crc32"]) for entry in entries]
    tables = [completed(pa.ipc.open_file(pa.BufferReader(content)).read_all()) for content in contents]
    return pa.concat_tables(tables) if tables else STEPS.empty_table()


def completed(table: pa.Table) -> pa.Table:
    """A table of steps with all columns of today, null where an earlier version did not write them."""
    for column in STEPS:
        if column.name not in table.schema.names:
            table = table.append_column(column, pa.nulls(len(table), column.type))
        place = table.schema.get_field_index(column.name)
        if table.schema.types[place] != column.type:  # it lacks a generator
            none = dict.fromkeys(GENERATORS)
            states = [row and [s and none | s for s in row] for row in table[column.name].to_pylist()]
            table = table.set_column(place, column, pa.array(states, column.type))
    return table
