"""The ``.ckpt`` files that a user's path, folder or list of paths means."""

import os
from collections.abc import Iterable
from pathlib import Path

from lightning_influence.trajectory.files import MANIFEST, runs_in
from lightning_influence.types import MissingEvidence

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def files_of(paths: Paths) -> list[Path]:
    """The files, in the order given; those of a folder by name.

    Raises:
        TypeError: something else than paths.
        ValueError: no paths, or an address of a remote file.
        MissingEvidence: a folder without ``.ckpt`` files, or a checkpoint that is spread over several files.
    """
    if isinstance(paths, (str, os.PathLike)):
        path = _local(paths)
        return _in_folder(path) if path.is_dir() else [path]
    if not isinstance(paths, Iterable):
        raise TypeError(
            f"Expected `paths` to be a Lightning checkpoint, a folder of them or a list of paths, got {paths!r}."
        )
    found = [_local(path) for path in paths]
    if not found:
        raise ValueError("Expected at least one path of a Lightning checkpoint, got none.")
    for path in found:
        if path.is_dir():
            _refuse_sharded(path)
            raise MissingEvidence(
                f"Expected a file in `paths`, got the folder `{path}`. Pass a folder alone, or the files in it."
            )
    return found


def _local(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"Expected `paths` to be paths of Lightning checkpoints, got {path!r}. Pass str or Path.")
    if "://" in os.fspath(path):
        raise ValueError(
            f"Expected `paths` on this machine, got {os.fspath(path)!r}. Copy the file to a local folder first, such as"
            " with `fsspec.open`."
        )
    return Path(path)


def _in_folder(folder: Path) -> list[Path]:
    _refuse_sharded(folder)
    found = sorted(folder.glob("*.ckpt"))
    for path in found:
        if path.is_dir():
            _refuse_sharded(path)
    files = [path for path in found if path.is_file()]
    if not files and ((folder / MANIFEST).is_file() or runs_in(folder)):
        raise MissingEvidence(
            f"Expected `.ckpt` files in the folder `{folder}`, got what `Influence` wrote. Pass it to"
            " `Trajectory.load`."
        )
    if files:
        return files
    below = sorted(
        {str(path.parent) for path in folder.glob("*/*.ckpt")} | {str(p.parent) for p in folder.glob("*/*/*.ckpt")}
    )
    raise MissingEvidence(
        f"Expected `.ckpt` files in the folder `{folder}`, got none."
        + (f" Pass the folder of one fit: {', '.join(map(repr, below[:3]))}." if below else " Correct `paths`.")
    )


def _refuse_sharded(folder: Path) -> None:
    """Raises MissingEvidence if the folder is itself a checkpoint, of which each process wrote a part."""
    if any(folder.glob("*.distcp")) or ((folder / ".metadata").is_file() and not any(folder.glob("*.ckpt"))):
        kind, tool = (
            "a distributed checkpoint (FSDP or tensor parallel)",
            (
                f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {folder}`, or train with "
                "`FSDPStrategy(state_dict_type='full')`"
            ),
        )
    elif (folder / "zero_to_fp32.py").is_file() or any(folder.glob("*/*model_states.pt")):
        kind, tool = (
            "a DeepSpeed checkpoint",
            ("`lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict`"),
        )
    else:
        return
    raise MissingEvidence(
        f"Expected a checkpoint in one file, got `{folder}`, a folder with {kind}. Make one file of it with {tool}."
    )
