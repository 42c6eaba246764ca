"""Finds and reads score files and runs for the commands."""

from pathlib import Path

from lightning_influence import Scores, SelfScores
from lightning_influence.files.arrow import map_batches, read_batches
from lightning_influence.trajectory.files import MANIFEST, runs_in

_LEVELS = 4  # below a folder, at which runs are looked for
_FOLDERS = 2000  # the most that are looked into


def load(path: Path) -> Scores | SelfScores:
    """The scores in a file, of whichever kind; for a folder, the only scores in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds no scores, or the folder does not hold exactly one file of them.
    """
    if path.is_dir():
        found = finished_files(path)
        if not found:
            raise ValueError(f"Expected a file of scores, got the folder {str(path)!r} with none.")
        if len(found) > 1:
            names = "".join(f"\n  {file}" for file in found)
            raise ValueError(f"Expected one file of scores, got the folder {str(path)!r}. Pass one of these:{names}")
        path = found[0]
    kind = map_batches(path, ("scores", "top_k_scores", "self_scores")).kind
    return SelfScores.load(path) if kind == "self_scores" else Scores.load(path)


def read_scores(path: Path) -> None:
    """Read a file of scores with all its checksums.

    Raises:
        ValueError: the file is damaged or holds no scores.
    """
    read_batches(path, ("scores", "top_k_scores", "self_scores"))
    load(path)


def score_files(folder: Path) -> list[Path]:
    """The score files in a run's folder, or in a folder of scores."""
    return sorted([*folder.glob("scores/*.arrow"), *folder.glob("*.arrow")])


def finished_files(folder: Path) -> list[Path]:
    """Those of methods that ran to their end; of a folder of runs, in the newest."""
    runs = runs_of(folder)
    return [file for file in score_files(runs[-1] if runs else folder) if not is_partial(file)]


def is_partial(path: Path) -> bool:
    """Whether a file holds the scores that were finished when an error or Ctrl-C ended a method."""
    return path.name.endswith(".partial.arrow")


def runs_of(path: Path) -> list[Path]:
    """The folder itself if it is a run, otherwise the runs in it, oldest first."""
    return [path] if (path / MANIFEST).is_file() else runs_in(path)


def below(path: Path) -> Path:
    """The folder itself if it holds runs or scores, otherwise the only one below it that does, as of a logger's run.

    Raises:
        ValueError: several folders below it hold runs or scores.
    """
    if not path.is_dir() or runs_of(path) or score_files(path):
        return path
    found = _below(path)
    if len(found) > 1:
        names = "".join(f"\n  {folder}" for folder in found)
        raise ValueError(f"Expected one folder of runs or scores, got {str(path)!r} above several. Pass one:{names}")
    return found[0] if found else path


def _below(path: Path) -> list[Path]:
    """Folders of runs or scores a few levels below one, level by level; none inside another."""
    found, level, left = [], [path], _FOLDERS
    for _ in range(_LEVELS):
        inside = [one for folder in level for one in _folders(folder)][:left]
        left -= len(inside)
        held = [one for one in inside if runs_of(one) or any(one.glob("*.arrow"))]
        found += held
        level = [one for one in inside if one not in held]
    return sorted(found)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(one for one in folder.iterdir() if one.is_dir() and not one.is_symlink() and one.name[0] != ".")
    except OSError:  # somebody else's
        return []


def existing(path: Path) -> Path:
    """The path, if it exists.

    Raises:
        FileNotFoundError: it does not.
        ValueError: it is a checkpoint of Lightning.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"Expected a folder that `Influence` wrote or a file of scores at {str(path)!r}, found nothing. "
            "The folder is beside the logger's run, or is the callback's `dirpath`."
        )
    if path.suffix == ".ckpt" or (path.is_dir() and any(path.glob("*.ckpt")) and not runs_of(path)):
        raise ValueError(
            f"Expected a folder that `Influence` wrote or a file of scores, got {str(path)!r} of Lightning's own. "
            "Read it in Python with `Trajectory.from_checkpoints(path)`."
        )
    return path
