"""Print the content of a folder of captured fits, a run or a file of scores."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_influence import MissingEvidence, SelfScores, Trajectory
from lightning_influence.cli.reading import below, existing, finished_files, is_partial, load, runs_of, score_files
from lightning_influence.cli.text import megabytes
from lightning_influence.scores.words import settings, table
from lightning_influence.trajectory.in_words import the_fit
from lightning_influence.wording import counted

_ROWS = 12  # of a list of checkpoints that are printed


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", type=Path, help="the folder `influence`, one of its run-N, or a file of scores")


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    path = below(existing(options.path))
    if path.is_file():
        scores = load(path)
        print(scores)
        if shown := settings(scores.settings):
            print(table(("setting", "value"), list(shown.items())))
        return 0
    runs, files = runs_of(path), score_files(path)
    if not runs and not files:
        raise MissingEvidence(
            f"Expected runs of `Influence` or files of scores in {str(path)!r}, found neither. "
            "Pass `dirpath` of the callback, one of its run-N, or a folder with `.arrow` files."
        )
    if runs and runs != [path]:
        print(f"{path}: {counted(len(runs), 'run')}")
        print(table(("run", "finished", "steps", "checkpoints", "examples", "seconds", "scores"), _lines(runs)))
        print()
    if runs:
        _show_run(runs[-1])
        files = score_files(runs[-1])
    if files:
        print(f"\n{counted(len(files), 'file')} of scores in {files[0].parent}")
        print(table(("file", "method", "queries", "examples", "kept", "units", "notes"), [_scores(f) for f in files]))
    return 0


def _lines(runs: Sequence[Path]) -> list[list[Any]]:
    lines: list[list[Any]] = []
    for folder in runs:
        try:
            found = Trajectory.load(folder)
        except MissingEvidence:
            lines.append([folder.name, "unreadable: see `verify`", None, None, None, None, None])
            continue
        numbers = len(found.steps), len(found.checkpoints), found.dataset_size, found.fit_seconds
        lines.append([folder.name, "yes" if found.finished else "no", *numbers, len(finished_files(folder))])
    return lines


def _show_run(folder: Path) -> None:
    found = Trajectory.load(folder)
    order = "known" if found.has_batch_order else "not known"
    size = sum(checkpoint.size for checkpoint in found.checkpoints)
    print(f"{folder}: {the_fit(found)}")
    print(f"  batch order {order}; {counted(len(found.checkpoints), 'checkpoint')}, {megabytes(size)}")
    for note in found.notes:
        print(f"  Note: {note}")
    rates = [", ".join(f"{rate:.4g}" for rate in found.learning_rates(i)) for i in range(len(found.checkpoints))]
    lines = [
        [point.step, point.epoch, rate, megabytes(point.size), point.path.name]
        for point, rate in zip(found.checkpoints, rates, strict=True)
    ]
    print(table(("step", "epoch", "learning rate", "size", "file"), lines[:_ROWS]))
    if len(lines) > _ROWS:
        print(f"  and {len(lines) - _ROWS} more")


def _scores(path: Path) -> list[Any]:
    try:
        scores = load(path)
    except (ValueError, OSError) as error:
        return [path.name, f"unreadable: {type(error).__name__}", None, None, None, None, None]
    top = getattr(scores, "top_k", None)
    kept = scores.title if isinstance(scores, SelfScores) else "all" if top is None else f"top {top}"
    kept += ", partial" * is_partial(path)
    units = None if scores.units == "arbitrary" else scores.units
    queries = None if isinstance(scores, SelfScores) else len(scores)
    return [path.name, scores.method, queries, scores.train_ids.numel(), kept, units, len(scores.notes)]
