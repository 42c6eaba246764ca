"""Check whether the files of a run are complete, and list what can be computed from them."""

import argparse
import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import lightning_influence
from lightning_influence import Evidence, Method, MissingEvidence, Trajectory
from lightning_influence.cli.reading import existing, load, runs_of, score_files
from lightning_influence.cli.text import table
from lightning_influence.trajectory.files import read_manifest, read_verified


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", type=Path, help="the folder `influence`, one of its run-N, or a file of scores")


def run(options: argparse.Namespace) -> int:
    """Check every file of every run; returns 1 if one is damaged."""
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
    print("\nAll files are intact." if not problems else f"\n{problems} problem{'s' * (problems > 1)} found.")
    return 1 if problems else 0


def _report(checks: list[tuple[str, str | None]]) -> int:
    """Print how many files are intact and what is wrong with the others; returns the number of problems."""
    wrong = [problem for _, problem in checks if problem is not None]
    print(f"  {len(checks) - len(wrong)} of {len(checks)} files are intact")
    for problem in wrong:
        print(f"  DAMAGED: {problem}")
    return len(wrong)


def _of_run(folder: Path) -> Iterator[tuple[str, str | None]]:
    """The name of every file listed in a run's manifests, and what is wrong with it or None."""
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
    """Print the notes of a run, and for each method whether its evidence is there."""
    for note in found.notes:
        print(f"  Note: {note}")
    missing = {
        Evidence.FINAL_WEIGHTS: None if found.checkpoints else "no checkpoint",
        Evidence.CHECKPOINTS: None if found.checkpoints and len(found.steps) else "no checkpoint with learning rates",
        Evidence.BATCH_ORDER: None if found.has_batch_order else "the batch order is not known",
        Evidence.TRACKER: "runs during a fit: `Influence(methods=[...])`",
        Evidence.REFIT: "retrains models: `Attributor(..., refit=Refit(...))`",
    }
    print("  methods that can be computed:")
    lines = []
    for name, needs in _methods():
        why = [text for evidence, text in missing.items() if text is not None and needs & evidence]
        lines.append((name, "; ".join(why) or "yes"))
    print(table(("method", "from this run"), lines, indent="    "))


def _methods() -> list[tuple[str, Evidence]]:
    """Each method of the package and its evidence. Methods are dataclasses, the kinds of method are not."""
    public = [getattr(lightning_influence, name) for name in dir(lightning_influence)]
    classes = [one for one in public if inspect.isclass(one) and issubclass(one, Method) and is_dataclass(one)]
    return [(one.__name__, one.needs) for one in classes]
