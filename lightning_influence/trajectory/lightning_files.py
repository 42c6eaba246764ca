"""Existing Lightning ``.ckpt`` files as checkpoints with learning rates."""

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.trajectory.averages import Which, average_in, chosen, tensors_of
from lightning_influence.trajectory.checkpoint import BestFile, Checkpoint, SavedState
from lightning_influence.trajectory.optimizer_steps import count_optimizers
from lightning_influence.trajectory.stored_rates import (
    Rates,
    given_rates,
    groups_of,
    may_differ,
    reconciled,
    stored_rates,
    warned_of_stored_rates,
)
from lightning_influence.trajectory.unpickling import read_plain
from lightning_influence.types import MissingEvidence, clean

_SAVED_BY = "Pass files that Lightning's `ModelCheckpoint` or `trainer.save_checkpoint` wrote."


@dataclass(frozen=True)
class LightningCheckpoint(Checkpoint):
    """A checkpoint in a Lightning ``.ckpt`` file.

    Args:
        which: of its weights; see ``averages``.
        prefix: in front of the names of all parameters, where a wrapper around the module was saved.
        own: the module's own values of what the file leaves out.
    """

    which: Which = "raw"
    prefix: str = ""
    own: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Empty: the whole file is compared when it is fitted to a module."""
        return {}

    def load(self) -> SavedState:
        """Read the file.

        Raises:
            MissingEvidence: the file is missing or unreadable, or does not have these weights.
        """
        own = {name: value.detach().clone() for name, value in self.own.items()}
        parameters, buffers = (
            own | {clean(name).removeprefix(self.prefix): value for name, value in part.items()}
            for part in chosen(read_file(self.path), self.path, self.which)
        )
        return SavedState(parameters=parameters, buffers=buffers, optimizer={}, random={})


@dataclass(frozen=True)
class _Rated:
    """A file's checkpoint, learning rates as they were passed or stored, and optimizer options."""

    checkpoint: LightningCheckpoint
    rates: list[float]
    groups: list[dict[str, Any]]


def read_lightning_files(
    paths: Sequence[Path], learning_rates: Rates, weights: str | None, in_folder: bool
) -> tuple[list[LightningCheckpoint], list[list[float]], dict[str, Any], list[str]]:
    """Read checkpoints in order, their learning rates, optimizer options and notes; the weights stay on disk."""
    if weights not in (None, "raw", "averaged"):
        raise ValueError(f"Expected `weights` to be 'raw' or 'averaged', got {weights!r}.")
    contents = {path: _with_steps(read_file(path), path) for path in paths}
    order = sorted(range(len(paths)), key=lambda k: contents[paths[k]]["global_step"])
    raw, notes = _averages(contents, weights)
    kept, dropped = _distinct([paths[k] for k in order if paths[k] in raw], contents)
    notes += _versions(contents)
    notes += dropped
    if in_folder:  # learning rates are in the order of the steps
        paths = kept
    given = given_rates(learning_rates, paths)
    which: Which = "averaged" if weights == "averaged" else "raw"
    rated = []
    for path in kept:
        content = contents[path]
        checkpoint = LightningCheckpoint(_step(content), _epoch(content), path, which=which)
        groups = groups_of(content)
        rated.append(_Rated(checkpoint, stored_rates(groups, path) if given is None else given[path], groups))
        if not chosen(content, path, which)[0]:
            raise MissingEvidence(f"Expected weights in `{path}`, got an empty `state_dict`. {_SAVED_BY}")
    if given is None and may_differ([contents[path] for path in kept], [one.rates for one in rated]):
        notes.append(warned_of_stored_rates())
    rates, settings = reconciled([one.rates for one in rated], rated[-1].groups)
    counted, more = count_optimizers([contents[path] for path in kept])
    return [one.checkpoint for one in rated], rates, settings | counted, [*notes, *more]


def read_file(path: Path) -> dict[str, Any]:
    """The content of a Lightning checkpoint, with placeholders for objects that are not plain data.

    Raises:
        MissingEvidence: the file is missing or damaged, or is no Lightning checkpoint.
    """
    try:
        content = read_plain(path)
    except FileNotFoundError as error:
        raise MissingEvidence(f"Expected a checkpoint at `{path}`, got {error.strerror!r}. Correct `paths`.") from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError) and "Weights only" in reason:
            reason = "it holds objects, and TORCH_FORCE_WEIGHTS_ONLY_LOAD forbids to read around them; unset it"
        raise MissingEvidence(
            f"Expected a whole checkpoint at `{path}`, got a file that torch cannot read ({reason})."
            " Leave it out of `paths`."
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        if isinstance(content, dict) and {"parameters", "buffers"} <= content.keys():
            raise MissingEvidence(
                f"Expected a Lightning checkpoint, got `{path}`, one of a run of `Influence`. Pass the run to "
                "`Trajectory.load`."
            )
        got = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
        raise MissingEvidence(f"Expected `state_dict` in `{path}`, got {got!r}. {_SAVED_BY}")
    return content


def deployed(path: Path) -> LightningCheckpoint:
    """The weights that ``load_from_checkpoint`` gives.

    Raises:
        MissingEvidence: the file is missing or damaged, or is no Lightning checkpoint.
    """
    content = read_file(path)
    tensors_of(content["state_dict"], path)
    known = {"global_step", "epoch"} <= content.keys()
    return LightningCheckpoint(_step(content) if known else -1, _epoch(content) if known else -1, path, which="saved")


def best_of(path: Path) -> BestFile | None:
    """What ``ModelCheckpoint`` had found best when a file was written; looked for beside the file, too."""
    states = read_file(path).get("callbacks")
    for state in states.values() if isinstance(states, Mapping) else ():
        found = state.get("best_model_path") if isinstance(state, Mapping) else None
        if isinstance(found, str) and found:
            here = path.parent / Path(found).name
            monitor = state.get("monitor")
            there = here if here.is_file() and not Path(found).is_file() else found
            return BestFile(str(there), monitor if isinstance(monitor, str) else None)
    return None


def _with_steps(content: dict[str, Any], path: Path) -> dict[str, Any]:
    missing = [key for key in ("global_step", "epoch") if not isinstance(content.get(key), int)]
    if missing:
        raise MissingEvidence(
            f"Expected `state_dict`, `global_step` and `epoch` in `{path}`, got no number under "
            f"{' and '.join(f'`{key}`' for key in missing)}. {_SAVED_BY}"
        )
    return content


def _before_1_6(content: Mapping[str, Any]) -> bool:
    """Whether the version that wrote a file, which it says since Lightning 0.8, counted epochs and steps otherwise."""
    found = re.match(r"(\d+)\.(\d+)", str(content.get("pytorch-lightning_version", "")))
    return found is not None and tuple(map(int, found.groups())) < (1, 6)


def _step(content: Mapping[str, Any]) -> int:
    return int(content["global_step"])


def _epoch(content: Mapping[str, Any]) -> int:
    """The epoch in which the file was written. Before Lightning 1.6 the files count the next one."""
    return max(0, int(content["epoch"]) - _before_1_6(content))


def _versions(contents: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    old = [path.name for path, content in contents.items() if _before_1_6(content)]
    return [
        f"{', '.join(old[:5])}{' ...' if len(old) > 5 else ''}: written by Lightning before 1.6, whose step count is "
        "one too high in a file saved after the fit."
    ] * bool(old)


def _averages(contents: Mapping[Path, Mapping[str, Any]], weights: str | None) -> tuple[list[Path], list[str]]:
    """The files that have the weights that were asked for, and notes; warns if both are there and nobody chose."""
    found = {path: average for path, content in contents.items() if (average := average_in(content, path)) is not None}
    files = list(contents)
    if not found:
        return files, []
    sources = " and ".join(sorted({average.source for average in found.values()}))
    if weights == "averaged":
        return files, [f"The averaged weights of {sources} are read; the steps were made at the raw ones."]
    files = [path for path in contents if path not in found or not found[path].alone]
    if not files and weights is None and len(contents) == 1:
        return list(contents), [f"The file holds the averaged weights of {sources} alone, which are read."]
    without = ", ".join(f"`{path}`" for path in contents if path not in files)
    why = f"saved after the fit, when {sources} had put the average in place of the raw weights"
    if not files:
        raise MissingEvidence(f"Expected raw weights in {without}, got files {why}. Pass `weights='averaged'`.")
    loaded = any("current_model_state" in content for content in contents.values())
    note = (
        f"{sources}, an averaging callback, was in this fit: the raw weights are read, at which the steps were made "
        f"(`load_from_checkpoint` gives {'the average' if loaded else 'these, too'}). For the average, pass "
        "`weights='averaged'` to `Trajectory.from_checkpoints`."
    )
    if weights is None:
        warnings.warn(note, UserWarning, stacklevel=4)
    return files, [note, f"{without}: left out, since {why}."] if without else [note]


def _distinct(paths: Sequence[Path], contents: Mapping[Path, Mapping[str, Any]]) -> tuple[list[Path], list[str]]:
    """One file for each step, and notes about those that were left out, such as ``last.ckpt``.

    Raises:
        MissingEvidence: two files of one step have different weights.
    """
    kept: dict[int, Path] = {}
    notes = []
    for path in sorted(dict.fromkeys(paths), key=lambda path: path.stem.startswith("last")):
        step = _step(contents[path])
        if step not in kept:
            kept[step] = path
            continue
        first = kept[step]
        if not _equal(contents[first]["state_dict"], contents[path]["state_dict"]):
            raise MissingEvidence(
                f"Expected checkpoints of one fit, got different weights at step {step} in `{first}` and `{path}`. Pass"
                " one of them: the other is of another fit, or has averaged weights."
            )
        notes.append(f"{path.name} holds the same weights as {first.name} (step {step}) and is left out.")
    return [kept[step] for step in sorted(kept)], notes


def _equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) and isinstance(other[name], Tensor) else True
        for name, value in one.items()
    )
