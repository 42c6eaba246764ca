"""Check whether the files of runs, scores and banks are as they were written, and list what can be computed."""

import argparse
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import lightning_influence
from lightning_influence import Evidence, Method, MissingEvidence, Trajectory
from lightning_influence.cli.reading import below, existing, read_scores, runs_of, score_files
from lightning_influence.curvature.store import read_any as read_prepared
from lightning_influence.files.arrow import read_batches
from lightning_influence.files.atomic import left_over
from lightning_influence.refit.store import MANIFEST as BANK
from lightning_influence.refit.store import check_models, read_bank
from lightning_influence.scores.words import table
from lightning_influence.setting.kept_checks import read_whole
from lightning_influence.tracking.record import load as load_tracked
from lightning_influence.trajectory.files import read_manifest, read_verified
from lightning_influence.wording import counted


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", type=Path, help="the folder `influence`, one of its run-N, a bank, or a file of scores")
    parser.add_argument("--clean", action="store_true", help="remove the unfinished files of killed processes")


def run(options: argparse.Namespace) -> int:
    """Check every file of every run; returns 1 if one is damaged."""
    path = existing(options.path)
    banks = sorted(found.parent for found in path.rglob(BANK)) if path.is_dir() else []
    path = path if banks else below(path)
    runs = runs_of(path) if path.is_dir() else []
    files = [path] if path.is_file() else score_files(path) if not runs and path not in banks else []
    if not runs and not files and not banks:
        raise MissingEvidence(
            f"Expected runs of `Influence`, banks of `Refit` or files of scores in {str(path)!r}, found none of them."
        )
    problems = 0
    for folder in runs:
        print(f"{folder}")
        bad = _report(itertools.chain(_of_run(folder), _beside_run(folder)))
        problems += bad
        if not bad:
            _computable(Trajectory.load(folder))
    for folder in banks:
        print(f"{folder}")
        problems += _report(_of_bank(folder))
    problems += _report(_problem(read_scores, file) for file in files) if files else 0
    _left_over(path, options.clean)
    print("\nAll files are intact." if not problems else f"\n{counted(problems, 'problem')} found.")
    return 1 if problems else 0


def _report(checks: Iterable[str | None]) -> int:
    """Print how many files are intact and what is wrong with the others; returns the number of problems."""
    found = list(checks)
    wrong = [problem for problem in found if problem is not None]
    print(f"  {len(found) - len(wrong)} of {counted(len(found), 'file', 'is')} intact")
    for problem in wrong:
        print(f"  DAMAGED: {problem}")
    return len(wrong)


def _of_run(folder: Path) -> Iterator[str | None]:
    """What is wrong with each file listed in a run's manifests; None where it is intact."""
    ranks = [folder]
    while ranks:
        part = ranks.pop(0)
        try:
            manifest = read_manifest(part)
        except MissingEvidence as error:
            yield str(error)
            continue
        yield None
        if part == folder:
            ranks = [folder / f"steps-rank{rank}" for rank in range(1, manifest["world_size"])]
        averaged = [manifest["averaged"]] if manifest.get("averaged") else []
        for entry in [*manifest["checkpoints"], *averaged, *manifest["steps"]]:
            yield _problem(read_verified, part / entry["file"], entry["size"], entry["crc32"])


def _beside_run(folder: Path) -> Iterator[str | None]:
    """The same for everything that was computed from a run."""
    for file in score_files(folder):
        yield _problem(read_scores, file)
    for file in sorted(folder.glob("features/*.arrow")):
        yield _problem(read_batches, file, ("features", "head"))
    for file in sorted(folder.glob("curvature/*")):
        yield _problem(read_prepared, file) if not file.name.startswith(".") else None
    for file in sorted(folder.glob("checks/*.json")):
        yield _problem(read_whole, file)
    for file in sorted(folder.glob("trackers/*/*.pt")):
        yield _problem(load_tracked, file)


def _of_bank(folder: Path) -> Iterator[str | None]:
    """The same for a bank of retrained models."""
    yield _problem(read_bank, folder / BANK)
    for file in sorted(folder.glob("models-*.arrow")):
        yield _problem(check_models, file)


def _left_over(path: Path, clean: bool) -> None:
    """Name the unfinished files of killed processes, or remove them."""
    found = left_over(path) if path.is_dir() else []
    for file in found:
        print(f"  {'removed' if clean else 'left over'}: {file}")
        if clean:
            file.unlink()
    if found and not clean:
        print("  A process was killed while it wrote them; `verify --clean` removes them.")


def _problem(read: Callable[..., object], *arguments: Any) -> str | None:
    """Why a file cannot be read; None where it can."""
    try:
        read(*arguments)
    except (MissingEvidence, ValueError, OSError) as error:
        return str(error)
    except Exception as error:  # of a file without checksums, anything may be wrong
        return f"{arguments[0]}: {type(error).__name__}: {error}"
    return None


def _computable(found: Trajectory) -> None:
    """Print the notes of a run, and for each method whether its evidence is there."""
    for note in found.notes:
        print(f"  Note: {note}")
    broken = None if found.broken is None else "the record broke off"
    missing = {
        Evidence.FINAL_WEIGHTS: broken or (None if found.checkpoints else "no checkpoint"),
        Evidence.CHECKPOINTS: None if found.checkpoints and len(found.steps) else "no checkpoint with learning rates",
        Evidence.BATCH_ORDER: None if found.has_batch_order else "the batch order is not known",
        Evidence.TRACKER: "runs during a fit: `Influence(methods=[...])`",
        Evidence.REFIT: "retrains models: `Attributor(..., refit=Refit(...))`",
    }
    if found.broken is not None:  # whatever follows the fit
        missing |= dict.fromkeys((Evidence.CHECKPOINTS, Evidence.BATCH_ORDER), broken)
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
