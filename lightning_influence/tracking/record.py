"""Files that trackers write beside a trajectory, named by a method and its hyper-parameters."""

import hashlib
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from lightning_influence.files.atomic import whole
from lightning_influence.files.regular import check_regular
from lightning_influence.tracking.tracker import TrackerState
from lightning_influence.types import MissingEvidence

FOLDER = "trackers"
_NAMED = re.compile(r".*\.crc([0-9a-f]{8})\.pt")


def record_name(method: str, settings: Mapping[str, Any]) -> str:
    """Name of a record's folder: the method's class, and a digest of its hyper-parameters."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
    return f"{method}-{digest[:8]}"


def save(path: Path, content: Any) -> Path:
    """Write tensors and builtins; readers find the complete file or none.

    Returns:
        The path, with the checksum of the file in its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []

    def named(file: IO[bytes]) -> Path:
        file.seek(0)
        found.append(path.with_name(f"{path.stem}.crc{_checksum(file):08x}{path.suffix}"))
        return found[0]

    with whole(path, named=named) as file:
        torch.save(content, file)
    return found[0]


def load(path: Path) -> Any:
    """Read what ``save`` wrote, mapped into memory.

    Raises:
        MissingEvidence: the file is missing or damaged.
    """
    try:
        check_regular(path)
        if not zipfile.is_zipfile(path):  # by its end: it may be very large
            raise ValueError("the file is cut short or of another kind")
        check(path)
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise MissingEvidence(
            f"Expected what was tracked during the fit in `{path}`, got {type(error).__name__}: {error}. Fit again, or "
            "load another run."
        ) from error


def check(path: Path) -> None:
    """Compare a file with the checksum in its name; earlier versions wrote none.

    Raises:
        ValueError: they differ.
    """
    named = _NAMED.fullmatch(path.name)
    if named is None:
        return
    with path.open("rb") as file:
        if _checksum(file) != int(named[1], 16):
            raise ValueError("the file has changed since it was written")


def save_state(folder: Path, step: int, state: TrackerState) -> None:
    """Write the state of a tracker after a step."""
    tensors = {name: tensor.cpu() for name, tensor in state.tensors.items()}  # the file names no device
    path = save(folder / f"step-{step:08d}.pt", {"tensors": tensors, "facts": state.facts})
    for other in _states(folder, step):
        if other != path:
            other.unlink()


def load_state(folder: Path, step: int) -> TrackerState | None:
    """Read that state; None if it was not written."""
    paths = _states(folder, step)
    return TrackerState(**load(paths[-1])) if paths else None


def _states(folder: Path, step: int) -> list[Path]:
    """The files of a tracker's state after a step: one, or two if writing the second was interrupted."""
    names = (f"step-{step:08d}.pt", f"step-{step:08d}.crc????????.pt")
    return sorted((path for name in names for path in folder.glob(name)), key=lambda path: path.stat().st_mtime_ns)


def _checksum(file: IO[bytes]) -> int:
    checksum = 0
    while part := file.read(2**20):
        checksum = zlib.crc32(part, checksum)
    return checksum


def load_record(run: Path | None, name: str, step: int) -> TrackerState:
    """Read what was tracked for a method during a fit.

    Args:
        run: folder of the fit.
        name: see ``record_name``.
        step: the last step of the fit.

    Raises:
        MissingEvidence: nothing was tracked for these hyper-parameters, or not until the last step.
    """
    method = name.partition("-")[0]
    folder = None if run is None else run / FOLDER / name
    found = None if folder is None else load_state(folder, step)
    if found is None:
        kept = sorted(p.name for p in folder.parent.iterdir()) if folder is not None and folder.parent.is_dir() else []
        made, instead = ("HyDRA.during_fit", "HyDRA()") if method == "HyDRA" else (method, "TracInCP()")
        raise MissingEvidence(
            f"Expected `{name}` as of step {step} in `{run}`, got {', '.join(kept) or 'nothing'}: `{made}(...)` with "
            "these hyper-parameters follows a fit while it runs and cannot be computed afterwards. Fit with "
            f"`Trainer(callbacks=[Influence([{made}(...)], queries=...)])`, or use `{instead}`."
        )
    return found
