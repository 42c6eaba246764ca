"""What the commands read: score files of either kind, and the runs of a folder."""

from pathlib import Path

from lightning_influence import Scores, SelfScores
from lightning_influence.files.arrow import read_file
from lightning_influence.trajectory.files import MANIFEST, runs_in


def load(path: Path) -> Scores | SelfScores:
    """The scores in a file, whichever they are; a run's folder stands for the only scores in it.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is damaged or something else, or the folder holds several.
    """
    if path.is_dir():
        found = score_files(path)
        if len(found) != 1:
            names = ", ".join(str(file) for file in found) or "none"
            raise ValueError(f"Expected one file of scores, got the folder {str(path)!r} with {names}. Name one.")
        path = found[0]
    kind = read_file(path, ("scores", "top_k_scores", "self_scores"))[0]
    return SelfScores.load(path) if kind == "self_scores" else Scores.load(path)


def score_files(folder: Path) -> list[Path]:
    """The score files of a run, or of a folder of scores."""
    return sorted([*folder.glob("scores/*.arrow"), *folder.glob("*.arrow")])


def runs_of(path: Path) -> list[Path]:
    """The folder itself where it is a run, else the runs in it, oldest first."""
    return [path] if (path / MANIFEST).is_file() else runs_in(path)


def existing(path: Path) -> Path:
    """The path, or what is wrong with it.

    Raises:
        FileNotFoundError: there is nothing.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"Expected a folder that `Influence` wrote or a file of scores at {str(path)!r}, found nothing. "
            "It stands beside the logger's run, or in `dirpath=`."
        )
    return path
