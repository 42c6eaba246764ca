"""Reads a run from its folder, joined with the runs it was resumed from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_influence.trajectory.checkpoint import BestFile, Checkpoint
from lightning_influence.trajectory.columns import encode_rows
from lightning_influence.trajectory.files import MANIFEST, STEPS, read_manifest, read_steps, runs_in
from lightning_influence.trajectory.fit_data import FitData, decode_fit_data
from lightning_influence.types import MissingEvidence


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


def find_run(dirpath: Path) -> tuple[Path, list[str]]:
    """The folder itself if it is a run, otherwise the newest run in it that has a manifest; and notes.

    Raises:
        MissingEvidence: there is none.
    """
    if (dirpath / MANIFEST).is_file():
        return dirpath, []
    notes: list[str] = []
    for run in reversed(runs_in(dirpath)):
        if (run / MANIFEST).is_file():
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


def read_run(folder: Path, until: int | None = None) -> Run:
    """Read a run up to step ``until`` (None: all of it), joined with the runs it was resumed from."""
    manifest = read_manifest(folder)
    run = Run(
        path=folder,
        checkpoints=tuple(_checkpoint(folder, entry) for entry in manifest["checkpoints"]),
        steps=_union_of_ranks(folder, manifest),
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
        fit_data=decode_fit_data(manifest.get("data")),
    )
    if manifest["parent"] is not None:
        _join(run, manifest["parent"], first_is_resumed=manifest["checkpoints"][:1])
    if until is not None:
        run.checkpoints = tuple(c for c in run.checkpoints if c.step <= until)
        run.trainer_values = tuple(at for at in run.trainer_values if at[0] <= until)
        before = {path: [at for at in values if at[0] <= until] for path, values in run.numbers.items()}
        run.numbers = {path: values for path, values in before.items() if values}
        run.removed = tuple(step for step in run.removed if step <= until)
        run.steps = run.steps.filter(pc.field("step") <= until)
    return run


def _checkpoint(folder: Path, entry: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(entry["step"], entry["epoch"], folder / entry["file"], entry["size"], entry["crc32"])


def _join(run: Run, link: dict[str, Any], first_is_resumed: list[dict[str, Any]]) -> None:
    parent = parent_run(run.path, link)
    if parent is None:
        run.notes.append(
            f"{run.path.name} resumed {link['run']} at step {link['step']}, which is no longer in {link['path']!r}:"
            f" the steps before it are unknown."
        )
        return
    older = read_run(parent, until=link["step"])
    known = max((c.step for c in older.checkpoints), default=-1)
    known = max(known, pc.max(older.steps["step"]).as_py() or 0) if len(older.steps) else known
    if known < link["step"]:
        run.notes.append(f"Steps {known + 1} to {link['step']} of {link['run']} were never written to disk.")
    if older.dataset_size != run.dataset_size:
        run.notes.append(f"The dataset had {older.dataset_size} examples in {link['run']}, {run.dataset_size} after.")
    # the state that a resumed fit starts from is not on the checkpoint schedule: an uninterrupted fit would not have it
    own = run.checkpoints[1:] if first_is_resumed and first_is_resumed[0]["kind"] == "initial" else run.checkpoints
    run.checkpoints = older.checkpoints + own
    run.removed = older.removed + run.removed
    shift = pa.scalar(len(older.settings), pa.int32())
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
        try:
            if read_manifest(candidate)["id"] == link["id"]:
                return candidate
        except MissingEvidence:
            continue
    return None


def _union_of_ranks(folder: Path, manifest: dict[str, Any]) -> pa.Table:
    """One row per step with the micro-batches of all ranks; gradients are means over ranks, hence the divisor."""
    tables = [read_steps(folder, manifest["steps"])]
    for rank in range(1, manifest["world_size"]):
        try:
            other = read_manifest(folder / f"steps-rank{rank}")
            tables.append(read_steps(folder / f"steps-rank{rank}", other["steps"]))
        except MissingEvidence:
            tables.append(tables[0].slice(0, 0))
    if len(tables) == 1:
        return tables[0]
    length = min(len(table) for table in tables)  # a rank that was killed may have written less
    rows = [table.slice(0, length).to_pylist() for table in tables]
    for row, *others in zip(*rows, strict=True):
        for name in ("ids", "loader_ids", "sizes", "rng", "read_rng", "batch_idx"):
            parts = [row[name], *(other[name] for other in others)]
            row[name] = None if any(part is None for part in parts) else [x for part in parts for x in part]
        row["divisor"] *= len(tables)
    return pa.Table.from_batches([encode_rows(rows[0], STEPS)])
