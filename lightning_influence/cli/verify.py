"""Check whether the files of a run are complete, and list what can be computed from them."""

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path

import lightning_influence
from lightning_influence import Evidence, Method, MissingEvidence, Trajectory
from lightning_influence.cli.reading import existing, load, runs_of, score_files
from lightning_influence.cli.text import table
from lightning_influence.trajectory.files import read_manifest, read_verified


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("path", type=Path, help="the folder `influence`, one of its run-N, or a file of scores")


def run(options: argparse.Namespace) -> int:
    """Check every file of every run; 1 where one is not whole."""
    path = existing(options.path)
    runs = runs_of(path) if path.is_dir() else []
    files = [path] if path.is_file() else score_files(path) if not runs else []
    if not runs and not files:
        raise MissingEvidence(f"Expected runs of `Influence` or files of scores in {str(path)!r}, found neither.")
    problems = 0
    for folder in runs:
        print(f"{folder}")
        bad = _report([*_of_run(folder), *_of_scores(score_files(folder))])
        problems += bad
        if not bad:
            _computable(Trajectory.load(folder))
    problems += _report([*_of_scores(files)]) if files else 0
    print("\nAll files are whole." if not problems else f"\n{problems} problem{'s' * (problems > 1)} found.")
    return 1 if problems else 0


def _report(checks: list[tuple[str, str | None]]) -> int:
    """Print what is wrong, or that nothing is; returns how many problems there are."""
    wrong = [problem for _, problem in checks if problem is not None]
    print(f"  {len(checks) - len(wrong)} of {len(checks)} files are whole")
    for problem in wrong:
        print(f"  DAMAGED: {problem}")
    return len(wrong)


def _of_run(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Every file that the manifests of a run list: its name, and what is wrong with it."""
    ranks = [folder]
    while ranks:
        part = ranks.pop(0)
        try:
            manifest = read_manifest(part)
        except MissingEvidence as error:
            yield part.name, str(error)
            continue
        yield part.name, None
        if part == folder:
            ranks = [folder / f"steps-rank{rank}" for rank in range(1, manifest["world_size"])]
        for entry in [*manifest["checkpoints"], *manifest["steps"]]:
            try:
                read_verified(part / entry["file"], entry["size"], entry["crc32"])
            except MissingEvidence as error:
                yield entry["file"], str(error)
            else:
                yield entry["file"], None


def _of_scores(files: list[Path]) -> Iterator[tuple[str, str | None]]:
    for path in files:
        try:
            load(path)
        except (ValueError, OSError) as error:
            yield path.name, str(error)
        else:
            yield path.name, None


def _computable(found: Trajectory) -> None:
    """Print what is missing for a whole record, and which methods have what they need."""
    for note in found.notes:
        print(f"  Note: {note}")
    missing = {
        Evidence.FINAL_WEIGHTS: None if found.checkpoints else "no checkpoint",
        Evidence.CHECKPOINTS: None if found.checkpoints and len(found.steps) else "no checkpoint with learning rates",
        Evidence.BATCH_ORDER: None if found.has_batch_order else "the batch order is not known",
        Evidence.TRACKER: "watches a fit while it runs: `Influence(methods=[...])`",
        Evidence.REFIT: "trains again: `Attributor(..., refit=Refit(...))`",
    }
    print("  what can be computed:")
    lines = []
    for name, needs in _methods():
        why = [text for evidence, text in missing.items() if text is not None and needs & evidence]
        lines.append((name, "; ".join(why) or "yes"))
    print(table(("method", "from this run"), lines, indent="    "))


def _methods() -> list[tuple[str, Evidence]]:
    """Each method of the package and what it needs; where that depends on its settings, by default."""
    public = [getattr(lightning_influence, name) for name in lightning_influence.__all__]
    classes = [
        one for one in public if inspect.isclass(one) and issubclass(one, Method) and not inspect.isabstract(one)
    ]
    return [(one.__name__, one.needs if isinstance(one.needs, Evidence) else one().needs) for one in classes]
