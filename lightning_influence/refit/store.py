"""Trained models on disk, written as they finish, and found by subset and seed."""

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout  # a dependency of torch
from torch import Tensor

from lightning_influence.files import checked_json
from lightning_influence.files.atomic import whole
from lightning_influence.files.regular import read_regular
from lightning_influence.files.sealed import SealedFile, seal
from lightning_influence.processes import Processes

FORMAT = 1
MANIFEST = "bank.json"
_LARGEST = 2**26  # bytes of it
_SEALED = b"sealed"

_ROWS = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("membership", pa.binary()),  # one bit an example, the first in the lowest bit
        pa.field("seed", pa.int64()),
        pa.field("seconds", pa.float64()),
        pa.field("weights", pa.binary()),  # the tensors of the manifest's layout, one behind the other
    ]
)


@dataclass(frozen=True)
class TrainedModel:
    """One finished model.

    Args:
        membership: [train] bool.
        seed: under which it was initialised and trained.
        seconds: training time.
        weights: parameters and buffers, on the CPU.
    """

    membership: Tensor
    seed: int
    seconds: float
    weights: Mapping[str, Tensor] = field(repr=False)

    @property
    def key(self) -> str:
        """Identifies the model in the store."""
        return key_of(self.membership, self.seed)

    @cached_property
    def broken(self) -> str | None:
        """Name of the first tensor that holds NaN or infinity."""
        weights = self.weights.items()
        return next((name for name, w in weights if w.is_floating_point() and not w.isfinite().all()), None)


def key_of(membership: Tensor, seed: int) -> str:
    """A hash of a subset and a seed."""
    return hashlib.sha256(_packed(membership) + f":{len(membership)}:{seed}".encode()).hexdigest()[:24]


class ModelStore:
    """A folder of Arrow files, each with models that finished together.

    Args:
        folder: created if it is missing.
        identity: what all models in it share: dataset, module, how they are trained.
        layout: name, dtype and shape of each tensor of a model.
        processes: that train into the folder together, each a part of the models.

    Raises:
        ValueError: the folder holds models of another identity.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        layout: Mapping[str, tuple[str, list[int]]],
        processes: Processes | None = None,
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.processes = Processes() if processes is None else processes
        folder.mkdir(parents=True, exist_ok=True)
        self._check(json.loads(json.dumps({"format": FORMAT, "layout": layout, **identity})))
        self._places: dict[str, tuple[Path, int]] = {}
        self._numbers: set[int] = set()  # of the files that were read or written
        self._refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Locks the folder against others that train models into it, and picks up the models they added.

        Of several processes that train together, the first holds the lock; all pick up each other's models at the end.

        Raises:
            RuntimeError: somebody else holds the lock; the processes do not see the same folder.
        """
        with self._lock() if self.processes.rank == 0 else contextlib.nullcontext():
            self._refresh_together()
            yield
            self._refresh_together()

    def _lock(self) -> contextlib.AbstractContextManager[Any]:
        try:
            return FileLock(self.folder / ".lock").acquire(timeout=0)
        except Timeout:
            raise RuntimeError(
                f"Expected to be the only process that trains models into `{self.folder}`, got another one that does. "
                "Wait for it, or choose another `dirpath`."
            ) from None

    def add(self, models: Sequence[TrainedModel]) -> None:
        """Writes finished models as one file, atomically; models already in the store are skipped."""
        new = [model for model in models if model.key not in self]
        if not new:
            return
        arrays = [
            pa.array([m.key for m in new]),
            pa.array([_packed(m.membership) for m in new], pa.binary()),
            pa.array([m.seed for m in new], pa.int64()),
            pa.array([m.seconds for m in new], pa.float64()),
            pa.array([self._bytes(m.weights) for m in new], pa.binary()),
        ]
        number = max(self._numbers, default=-1) + 1
        number += (self.processes.rank - number) % self.processes.count  # which no other process takes
        path = self.folder / f"models-{number:06d}.arrow"
        with whole(path) as file:
            with pa.ipc.new_file(file, _ROWS.with_metadata({_SEALED: b"1"})) as writer:
                start = file.tell()
                writer.write_batch(pa.record_batch(arrays, schema=_ROWS))
            seal(file, [start])
        self._numbers.add(number)
        self._places |= {model.key: (path, row) for row, model in enumerate(new)}

    def weights(self, keys: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """The tensors of the given models, one model in memory at a time."""
        opened: tuple[Path | None, Any, Any] = (None, None, None)
        for key in keys:
            path, row = self._places[key]
            if opened[0] != path:
                opened = path, *open_models(path)
            file, models = opened[1:]
            _, offsets, values = models["weights"].buffers()
            start, stop = np.frombuffer(offsets, np.int32, 2, row * 4)
            content = values.slice(start, stop - start)  # a scalar's `as_buffer` is a copy
            try:
                file.check_buffer(content)
            except ValueError as error:
                raise ValueError(f"{error} If you remove it, its models are trained again.") from error
            yield self._tensors(content)

    def _refresh_together(self) -> None:
        self.processes.gathered(None)  # nobody is writing now
        self._refresh()
        seen = self.processes.gathered(len(self))
        if len(set(seen)) > 1:
            raise RuntimeError(
                f"Expected a folder that all processes see, got `{self.folder}` with {seen} models in them. Choose a "
                "`dirpath` on a disk that all machines share."
            )

    def _refresh(self) -> None:
        for path in sorted(self.folder.glob("models-*.arrow")):
            found = re.fullmatch(r"models-(\d+)", path.stem)
            if found is not None and (number := int(found[1])) not in self._numbers:
                self._numbers.add(number)
                self._index(path)

    def _index(self, path: Path) -> None:
        try:
            file, table = open_models(path)
            size = sum(_size(*entry) for entry in self.layout.values())
            used = [*table["key"].buffers(), *table["seconds"].buffers(), table["weights"].buffers()[1]]
            for buffer in filter(None, used):
                file.check_buffer(buffer)
            intact = bool(
                (np.diff(np.frombuffer(table["weights"].buffers()[1], np.int32, len(table) + 1)) == size).all()
            )
            keys = table["key"].to_pylist()
        except (pa.ArrowException, OSError, KeyError, ValueError):
            intact = False
        if not intact:
            warnings.warn(f"`{path}` is damaged: its models are trained again.", stacklevel=2)
            return
        self._places |= {key: (path, row) for row, key in enumerate(keys)}

    def _check(self, wanted: Mapping[str, Any]) -> None:
        path = self.folder / MANIFEST
        if not path.is_file():
            with whole(path) as file:
                file.write(checked_json.encode(wanted))
            return
        found = read_bank(path)
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"Expected a bank of models with `{name}` {_short(value)} in `{self.folder}`, got one with "
                    f"{_short(found.get(name))}. Its models were trained on something else: choose another `dirpath`."
                )

    def _bytes(self, weights: Mapping[str, Tensor]) -> bytes:
        return b"".join(bytes_of(weights[name]) for name in self.layout)

    def _tensors(self, content: Any) -> dict[str, Tensor]:
        found, start = {}, 0
        every = np.frombuffer(content, np.uint8)
        for name, (dtype, shape) in self.layout.items():
            stop = start + _size(dtype, shape)
            found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            if stop > start:
                found[name].view(-1).view(torch.uint8).copy_(torch.from_numpy(every[start:stop].copy()))
            start = stop
        return found


def open_models(path: Path) -> tuple[SealedFile, pa.RecordBatch]:
    """A file of models, mapped; the values of its columns are verified by the caller.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    try:
        file = SealedFile(path)
        reader = pa.ipc.open_file(pa.py_buffer(file.pages))
        if not file.sealed and _SEALED in (reader.schema.metadata or {}):
            raise ValueError("its checksums are missing")
        models = reader.get_batch(0)
        models.validate(full=not file.sealed)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(
            f"Expected a file of retrained models in {str(path)!r}, got a damaged one ({error}). Remove it: its models "
            "are trained again."
        ) from error
    return file, models


def check_models(path: Path) -> None:
    """Compare all checksums of a file of models.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    open_models(path)[0].check()


def read_bank(path: Path) -> dict[str, Any]:
    """The description of a bank of models.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found = checked_json.decode(read_regular(path, _LARGEST), plain=True)
    except ValueError:
        found = None
    if found is None:
        raise ValueError(
            f"Expected the description of a bank of models in {str(path)!r}, got a damaged file. Restore it from a "
            "copy, or choose another `dirpath`: without it, nobody knows what its models were trained on."
        )
    return found


def layout_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[str, list[int]]]:
    """Name, dtype and shape of each tensor, in order."""
    return {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in weights.items()}


def digest_of(weights: Mapping[str, Tensor], **more: Any) -> str:
    """A hash of named tensors and of further JSON-serialisable values."""
    digest = hashlib.sha256(json.dumps(more, sort_keys=True, default=repr).encode())
    for name, value in weights.items():
        digest.update(name.encode() + bytes_of(value))
    return digest.hexdigest()[:24]


def bytes_of(leaf: Any) -> bytes:
    """The content of a leaf of a batch as bytes, for hashing; leaves of unknown types all give the same."""
    if isinstance(leaf, Tensor):
        return leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if leaf.numel() else b""
    return repr(leaf).encode() if isinstance(leaf, (str, int, float, bool, bytes, type(None))) else b"?"


def _size(dtype: str, shape: Sequence[int]) -> int:
    return torch.empty(0, dtype=getattr(torch, dtype)).element_size() * int(np.prod(shape, dtype=np.int64))


def _packed(membership: Tensor) -> bytes:
    return np.packbits(membership.bool().numpy(), bitorder="little").tobytes()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."
