"""Writes one run of one process to disk. Every file that the manifest lists is complete at all times."""

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from lightning_influence.compat import rank_zero_warn
from lightning_influence.files import checked_json
from lightning_influence.files.atomic import sync
from lightning_influence.trajectory.columns import encode_rows
from lightning_influence.trajectory.files import (
    BROKE_OFF,
    BROKEN,
    FORMAT,
    MANIFEST,
    STEPS,
    runs_in,
    write_atomically,
)


@dataclass(frozen=True)
class ParentLink:
    """The run that a fit resumes. Lightning checkpoints hold it as a dict, which loads with `weights_only=True`.

    `step` counts weight updates; Lightning's `global_step` also counts skipped steps.
    """

    run: str
    path: str
    id: str
    step: int


def resume_point(state: dict[str, Any], trainer: Any) -> tuple[ParentLink | None, int]:
    """Return the run that this fit resumes, if any, and the weight updates made so far."""
    if state and trainer.global_step > 0:
        return ParentLink(**{name: state[name] for name in ("run", "path", "id", "step")}), int(state["step"])
    if trainer.global_step > 0:
        rank_zero_warn(without_earlier_steps(trainer.global_step))
    return None, int(trainer.global_step)


def without_earlier_steps(first: int) -> str:
    """Says that a run begins in the middle of training."""
    return (
        f"This fit begins at step {first}, and the steps before it are not in its run: it resumes a checkpoint"
        " without the state of this `Influence` (which was missing, or had other arguments), or its Trainer was fitted"
        " before. Scores count the steps from there on."
    )


def claim_run(dirpath: Path) -> Path:
    """Create a new `run-N`. Creating a folder succeeds for one process only, so two fits never share one."""
    dirpath.mkdir(parents=True, exist_ok=True)
    number = max((int(re.sub(r"\D", "", run.name)) for run in runs_in(dirpath)), default=-1) + 1
    while True:
        folder = dirpath / f"run-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return folder


# At most what was written within this time is lost in a power failure; a killed process loses nothing.
_SYNC_SECONDS = 30.0


class RunWriter:
    """Writes the files of one process: checkpoints on rank 0, steps on every rank."""

    def __init__(
        self,
        folder: Path,
        world_size: int,
        parent: ParentLink | None,
        keep_last: int | None = None,
        callback: str = "",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._started = self._synced = time.monotonic()
        self._unsynced: list[Path] = []
        self._keep_last = keep_last
        self._surplus: list[Path] = []  # files that no manifest will list any more
        self._readable: bytes | None = None  # the manifest that readers see
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "id": os.urandom(16).hex(),  # not from Python's or torch's generator, whose states belong to training
            "callback": callback,
            "versions": {"torch": str(torch.__version__)},
            "parent": None if parent is None else vars(parent),
            "world_size": world_size,
            "dataset_size": None,
            "settings": [],
            "checkpoints": [],
            "steps": [],
            "notes": [],
            "trainer": [],
            "numbers": {},
            "finished": False,
            "fit_seconds": 0.0,
        }

    def note(self, text: str, warn: bool = True) -> None:
        """Add a note to the manifest, once, and warn."""
        if text not in self.manifest["notes"]:
            self.manifest["notes"].append(text)
            if warn:
                rank_zero_warn(text)

    def add_checkpoint(self, step: int, epoch: int, kind: str, content: bytes | memoryview, whole: bool = True) -> None:
        """Write a checkpoint, ``whole`` with the optimizer's state; readers see it once the manifest is written.

        One of the same step as the last takes its place, under another name while the manifest lists the last.
        """
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        listed = self.manifest["checkpoints"]
        again = bool(listed) and listed[-1]["step"] == step
        file = f"checkpoints/step-{step:08d}{'-whole' * again}.pt"
        entry = self._write(file, content)
        if again:
            last = listed.pop()
            epoch, kind = last["epoch"], last["kind"]
            self._surplus.append(self.folder / last["file"])
        listed.append({"file": file, "step": step, "epoch": epoch, "kind": kind, "whole": whole} | entry)
        later = [each for each in listed if each["kind"] != "initial"]  # replays start from the initial weights
        if self._keep_last is not None and len(later) > self._keep_last:
            oldest = later[0]
            listed.remove(oldest)
            self.manifest.setdefault("removed", []).append(oldest["step"])
            self._surplus.append(self.folder / oldest["file"])

    def add_averaged(self, step: int, epoch: int, content: bytes | memoryview) -> None:
        """Write the averaged weights at the end of the fit, which are no checkpoint of the trajectory."""
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        file = "checkpoints/averaged.pt"
        entry = self._write(file, content)
        self.manifest["averaged"] = {"file": file, "step": step, "epoch": epoch} | entry

    def add_steps(self, rows: list[dict[str, Any]]) -> None:
        """Write a segment of steps; readers see it once the manifest is written."""
        (self.folder / "steps").mkdir(exist_ok=True)
        file = f"steps/{len(self.manifest['steps']):08d}.arrow"
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="zstd" if pa.Codec.is_available("zstd") else None)
        with pa.ipc.new_file(sink, STEPS, options=options) as writer:
            writer.write_batch(encode_rows(rows, STEPS))
        entry = self._write(file, memoryview(sink.getvalue()))
        self.manifest["steps"].append({"file": file, "rows": len(rows)} | entry)

    @property
    def seconds(self) -> float:
        """Since the start of the fit."""
        return time.monotonic() - self._started

    def write_manifest(self) -> None:
        """Make everything added so far visible to readers."""
        self.manifest["fit_seconds"] = self.seconds
        due = self.manifest["finished"] or time.monotonic() - self._synced > _SYNC_SECONDS
        if due:
            for path in self._unsynced:
                sync(path)
            self._unsynced.clear()
        content = checked_json.encode(self.manifest)
        write_atomically(self.folder / MANIFEST, content, durable=due)
        self._readable = content
        if due:
            self._synced = time.monotonic()
        while self._surplus:  # now that the manifest does not list them
            self._surplus.pop().unlink(missing_ok=True)

    def break_off(self, why: str) -> bool:
        """After a failed write: go back to what readers see, and tell them that the fit went on without being recorded.

        Returns:
            Whether anything of the fit is missing: the record of one that has ended is complete.
        """
        seen = None if self._readable is None else checked_json.decode(self._readable)
        if seen is None:
            return True
        self.manifest = seen
        if not seen["finished"]:
            last = max((entry["step"] for entry in seen["checkpoints"]), default=0)
            seen["broken"] = f"{BROKE_OFF} {last}, the fit went on: {why}"
            seen["notes"].append(seen["broken"])
            with contextlib.suppress(OSError):  # takes no space, where there is none for a manifest
                (self.folder / BROKEN).touch()
            self.tell_broken()
        return "broken" in seen

    def tell_broken(self) -> None:
        """Write why the record is broken, where there is space again."""
        with contextlib.suppress(OSError):
            if "broken" in self.manifest:
                self.write_manifest()
                (self.folder / BROKEN).unlink(missing_ok=True)

    def _write(self, file: str, content: bytes | memoryview) -> dict[str, int]:
        path = self.folder / file
        entry = write_atomically(path, content, durable=False)
        self._unsynced.append(path)
        return entry
