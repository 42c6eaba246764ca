"""Files that trackers write beside a trajectory, named by a method and its hyper-parameters."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_influence.files.atomic import whole
from lightning_influence.tracking.tracker import TrackerState
from lightning_influence.types import MissingEvidence

FOLDER = "trackers"


def record_name(method: str, settings: Mapping[str, Any]) -> str:
    """Name of a record's folder: the method's class, and a digest of its hyper-parameters."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
    return f"{method}-{digest[:8]}"


def save(path: Path, content: Any) -> None:
    """Write tensors and builtins; readers find the complete file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        torch.save(content, file)


def load(path: Path) -> Any:
    """Read what ``save`` wrote, mapped into memory.

    Raises:
        MissingEvidence: the file is missing or damaged.
    """
    try:
        return torch.load(path, weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise MissingEvidence(
            f"Expected what was tracked during the fit in `{path}`, got {type(error).__name__}: {error}. Fit again, or "
            "load another run."
        ) from error


def save_state(folder: Path, step: int, state: TrackerState) -> None:
    """Write the state of a tracker after a step."""
    save(folder / f"step-{step:08d}.pt", {"tensors": state.tensors, "facts": state.facts})


def load_state(folder: Path, step: int) -> TrackerState | None:
    """Read that state; None if it was not written."""
    path = folder / f"step-{step:08d}.pt"
    return TrackerState(**load(path)) if path.is_file() else None


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
