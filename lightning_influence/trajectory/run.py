"""Reads a run from its folder, joined with the runs it was resumed from."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_influence.trajectory.checkpoint import BestFile, Checkpoint
from lightning_influence.trajectory.columns import encode_rows, number
from lightning_influence.trajectory.files import (
    BROKE_OFF,
    BROKEN,
    MANIFEST,
    STEPS,
    read_manifest,
    read_steps,
    runs_in,
)
from lightning_influence.trajectory.fit_data import FitData, decode_fit_data
from lightning_influence.types import MissingEvidence
from lightning_influence.wording import counted


@dataclass
class Run:
    """What a run's manifest and step files hold, named as in ``Trajectory``; the checkpoints stay on disk."""

    path: Path
    checkpoints: tuple[Checkpoint, ...]
    steps: pa.Table
    settings: tuple[dict[str, Any], ...]
    dataset_size: int | None
    finished: bool
    fit_seconds: float
    eval_modules: tuple[str, ...] = ()
    trainer_values: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    # plain attributes of the module that the fit changed: (step, value) by path
    numbers: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)
    removed: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)
    averaged: Checkpoint | None = None
    best: BestFile | None = None
    fit_data: FitData | None = None
    broken: str | None = None


def find_run(dirpath: Path) -> tuple[Path, list[str]]:
    """The folder itself if it is a run, otherwise the newest run in it that has a manifest; and notes.

    Raises:
        MissingEvidence: there is none.
    """
    if os.path.lexists(dirpath / MANIFEST):  # `read_manifest` says if it is no file
        return dirpath, []
    notes: list[str] = []
    for run in reversed(runs_in(dirpath)):
        if os.path.lexists(run / MANIFEST):
            return run, notes
        notes.append(
            f"{run.name} has no manifest (its fit stopped before the first checkpoint); an older run was read."
        )
    files = dirpath.suffix == ".ckpt" or any(dirpath.glob("*.ckpt"))
    raise MissingEvidence(
        f"Expected a run of `Influence` in `{dirpath}`, got {'checkpoints of Lightning' if files else 'none'}. "
        + (
            "Read them with `Trajectory.from_checkpoints`." * files
            or "Pass `dirpath` of the callback, or one of its run-N."
        )
    )


def read_run(folder: Path) -> Run:
    """Read a run, joined with the runs it was resumed from.

    Raises:
        MissingEvidence: a file is missing or damaged.
    """
    manifest, until = read_manifest(folder), None
    newer: list[tuple[Run, dict[str, Any]]] = []
    known: set[str] = set()
    while True:
        if manifest["id"] in known:
            raise MissingEvidence(f"Expected runs that resume earlier ones, got `{folder}`, which resumes itself.")
        known.add(manifest["id"])
        run, link = _up_to(_alone(folder, manifest), until), manifest["parent"]
        parent = None if link is None else parent_run(folder, link)
        if parent is None:
            break
        newer.append((run, manifest))
        folder, manifest, until = parent, read_manifest(parent), link["step"]
    if link is not None:
        run.notes.append(
            f"{run.path.name} resumed {link['run']} at step {link['step']}, which is no longer in {link['path']!r}:"
            f" the steps before it are unknown."
        )
    while newer:  # each of them holds all steps before it: only one is kept
        later, about = newer.pop()
        _join(later, about, run)
        run = later
    return run


def _alone(folder: Path, manifest: Mapping[str, Any]) -> Run:
    """A run without those that it was resumed from."""
    parts = [(folder, manifest), *_other_ranks(folder, manifest["world_size"])]
    run = Run(
        path=folder,
        checkpoints=tuple(_checkpoint(folder, entry) for entry in manifest["checkpoints"]),
        steps=_union_of_ranks(parts),
        settings=tuple(manifest["settings"]),
        dataset_size=manifest["dataset_size"],
        finished=manifest["finished"],
        fit_seconds=manifest["fit_seconds"],
        eval_modules=tuple(manifest.get("eval_modules", ())),
        trainer_values=tuple((step, values) for step, values in manifest.get("trainer", ())),
        numbers={path: [(at, value) for at, value in values] for path, values in manifest.get("numbers", {}).items()},
        removed=tuple(manifest.get("removed", ())),
        notes=list(manifest["notes"]),
        averaged=_checkpoint(folder, manifest["averaged"]) if manifest.get("averaged") else None,
        best=BestFile(**manifest["best"]) if manifest.get("best") else None,
        fit_data=_fit_data(folder, manifest),
    )
    if len(run.steps) and (pc.max(run.steps["settings"]).as_py() or 0) >= len(run.settings):
        raise MissingEvidence(
            f"Expected the options of every step in `settings` of the manifest `{folder / MANIFEST}`, got "
            f"{len(run.settings)} entries. Load another run, or fit again."
        )
    run.broken = next((why for part in parts if (why := _broken(*part)) is not None), None)
    if run.broken is not None and run.broken not in run.notes:
        run.notes.append(run.broken)
    return run


def _up_to(run: Run, until: int | None) -> Run:
    """What a run recorded up to a step; None: all of it."""
    if until is not None:
        run.checkpoints = tuple(c for c in run.checkpoints if c.step <= until)
        run.trainer_values = tuple(at for at in run.trainer_values if at[0] <= until)
        before = {path: [at for at in values if at[0] <= until] for path, values in run.numbers.items()}
        run.numbers = {path: values for path, values in before.items() if values}
        run.removed = tuple(step for step in run.removed if step <= until)
        run.steps = run.steps.filter(pc.less_equal(run.steps["step"], number(until)))
    return run


def _fit_data(folder: Path, manifest: Mapping[str, Any]) -> FitData | None:
    try:
        return decode_fit_data(manifest.get("data"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MissingEvidence(
            f"Expected `data` in the manifest `{folder / MANIFEST}` as a fit writes it, got {type(error).__name__}: "
            f"{error}. Load another run, or fit again."
        ) from error


def _checkpoint(folder: Path, entry: Mapping[str, Any]) -> Checkpoint:
    path, whole = folder / entry["file"], entry.get("whole", True) is not False
    return Checkpoint(entry["step"], entry["epoch"], path, entry["size"], entry["crc32"], whole)


def _join(run: Run, manifest: Mapping[str, Any], older: Run) -> None:
    """Put a run behind the one that it resumed."""
    link = manifest["parent"]
    known = max((c.step for c in older.checkpoints), default=-1)
    known = max(known, pc.max(older.steps["step"]).as_py() or 0) if len(older.steps) else known
    if known < link["step"]:
        run.notes.append(f"Steps {known + 1} to {link['step']} of {link['run']} were never written to disk.")
    if older.dataset_size != run.dataset_size:
        run.notes.append(f"The dataset had {older.dataset_size} examples in {link['run']}, {run.dataset_size} after.")
    # the state that a resumed fit starts from is not on the checkpoint schedule: an uninterrupted fit would not have it
    starts_anew = [entry["kind"] for entry in manifest["checkpoints"][:1]] == ["initial"]
    own = run.checkpoints[1:] if starts_anew else run.checkpoints
    run.checkpoints = older.checkpoints + own
    run.removed = older.removed + run.removed
    shift = number(len(older.settings), pa.int32())
    column = run.steps.schema.get_field_index("settings")
    shifted = run.steps.set_column(column, "settings", pc.add(run.steps["settings"], shift))
    run.steps = pa.concat_tables([older.steps, shifted])
    run.settings = older.settings + run.settings
    run.trainer_values = older.trainer_values + run.trainer_values
    for path, values in older.numbers.items():
        run.numbers[path] = values + run.numbers.get(path, [])
    run.fit_data = run.fit_data or older.fit_data
    run.fit_seconds += older.fit_seconds
    run.notes = [*older.notes, *run.notes]


def parent_run(folder: Path, link: Mapping[str, Any]) -> Path | None:
    """The run that a link refers to. A sibling is tried first: the whole folder may have been moved."""
    for candidate in (folder.parent / link["run"], Path(link["path"])):
        if ".." in candidate.parts:  # it was written without
            continue
        try:
            if read_manifest(candidate)["id"] == link["id"]:
                return candidate
        except MissingEvidence:
            continue
    return None


def _other_ranks(folder: Path, world_size: int) -> list[tuple[Path, dict[str, Any] | None]]:
    """Folder and manifest of the other processes; None of one that was killed before it wrote any."""
    folders = [folder / f"steps-rank{rank}" for rank in range(1, world_size)]
    return [(each, read_manifest(each) if (each / MANIFEST).exists() else None) for each in folders]


def _broken(folder: Path, manifest: Mapping[str, Any] | None) -> str | None:
    """Why the record ends before the fit did; None where it does not."""
    if manifest is None:
        return None
    notes = [note for note in manifest["notes"] if note.startswith(BROKE_OFF)]  # all that earlier versions wrote
    if (folder / BROKEN).exists():
        last = max((entry["step"] for entry in manifest["checkpoints"]), default=0)
        notes.append(f"{BROKE_OFF} {last}, the fit went on: `Influence` could not write to `{folder}` any more.")
    return manifest.get("broken") or next(iter(notes), None)


def _union_of_ranks(parts: Sequence[tuple[Path, Mapping[str, Any] | None]]) -> pa.Table:
    """One row per step with the micro-batches of all ranks; gradients are means over ranks, hence the divisor."""
    tables = [read_steps(folder, [] if manifest is None else manifest["steps"]) for folder, manifest in parts]
    if len(tables) == 1:
        return tables[0]
    length = min(len(table) for table in tables)  # a rank that was killed may have written less
    rows = [table.slice(0, length).to_pylist() for table in tables]
    for row, *others in zip(*rows, strict=True):
        for name in ("ids", "loader_ids", "sizes", "rng", "read_rng", "batch_idx"):
            parts = [row[name], *(other[name] for other in others)]
            row[name] = None if any(part is None for part in parts) else [x for part in parts for x in part]
        row["divisor"] *= len(tables)
        row["clip"] = next((each["clip"] for each in (row, *others) if each["clip"] is not None), None)
    return pa.Table.from_batches([encode_rows(rows[0], STEPS)])


def notes_on_the_end(run: Run) -> list[str]:
    """What a reader must know about where a record ends."""
    notes = []
    last = run.checkpoints[-1].step if run.checkpoints else 0
    behind = pc.sum(pc.and_(pc.greater(run.steps["step"], number(last)), pc.invert(run.steps["skipped"]))).as_py() or 0
    if behind and len(run.checkpoints) != 1:
        notes.append(f"Not counted: {counted(behind, 'step')} after the last checkpoint (step {last}).")
    kept = [c.step for c in run.checkpoints if c.step > max(run.removed)] if run.removed else []
    if run.removed and kept:
        notes.append(
            f"Removed (`keep_last=`): {counted(len(run.removed), 'checkpoint')} up to step {max(run.removed)}; sums"
            f" over checkpoints count steps {max(run.removed) + 1} to {kept[-1]} only."
        )
    if not run.finished and run.broken is None:
        notes.append("The fit did not finish: this is what it had written by then.")
    return notes
