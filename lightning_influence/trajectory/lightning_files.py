"""Existing Lightning ``.ckpt`` files as checkpoints with learning rates."""

import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.trajectory.checkpoint import Checkpoint, SavedState
from lightning_influence.types import MissingEvidence, clean

_Rates = float | Sequence[float | Sequence[float]] | None


class LightningCheckpoint(Checkpoint):
    """A checkpoint in a Lightning ``.ckpt`` file."""

    def load(self) -> SavedState:
        """Read the file.

        Raises:
            MissingEvidence: the file is missing or unreadable.
        """
        weights = {clean(name): value for name, value in _raw_weights(_read(self.path), self.path).items()}
        return SavedState(parameters=weights, buffers=weights, optimizer={}, random={})


def read_lightning_files(
    paths: Sequence[Path], learning_rates: _Rates
) -> tuple[list[LightningCheckpoint], list[list[float]], dict[str, Any], list[str]]:
    """Read checkpoints in order, their learning rates, optimizer options and notes; the weights stay on disk."""
    if not paths:
        raise ValueError("Expected at least one path of a Lightning checkpoint, got none.")
    if isinstance(learning_rates, Sequence) and len(learning_rates) != len(paths):
        raise ValueError(
            f"Expected one entry of `learning_rates` for each of {len(paths)} checkpoints, got {len(learning_rates)!r}."
        )
    contents = [_read(path) for path in paths]
    order = sorted(range(len(paths)), key=lambda k: contents[k]["global_step"])
    notes = []
    if any("current_model_state" in content for content in contents):
        notes.append("An averaging callback wrote these files: the raw weights in them are read, not the average.")
    stored = [_groups_of(content) for content in contents]
    if learning_rates is None:
        rates = [_stored_rates(groups, path) for groups, path in zip(stored, paths, strict=True)]
        warning = (
            "The learning rates stored in Lightning checkpoints are those of the step after the checkpoint was written;"
            " with a schedule they differ from what was applied. Pass `learning_rates=` to"
            " `Trajectory.from_checkpoints` to set them."
        )
        warnings.warn(warning, UserWarning, stacklevel=4)
        notes.append(warning)
    else:
        given = list(learning_rates) if isinstance(learning_rates, Sequence) else [learning_rates] * len(paths)
        rates = [[float(x) for x in rate] if isinstance(rate, Sequence) else [float(rate)] for rate in given]
    rates, settings = _reconcile([rates[k] for k in order], stored[order[-1]])
    checkpoints = [
        LightningCheckpoint(int(contents[k]["global_step"]), int(contents[k]["epoch"]), Path(paths[k])) for k in order
    ]
    return checkpoints, rates, settings, notes


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise MissingEvidence(
            f"Expected a checkpoint of tensors and builtins at `{path}`, got other objects, which are not safe to load"
            f" ({str(error).splitlines()[0]}). Allow their classes with `torch.serialization.add_safe_globals`."
        ) from error
    except FileNotFoundError as error:
        raise MissingEvidence(f"Expected a checkpoint at `{path}`, got {error.strerror!r}. Correct `paths`.") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise MissingEvidence(
            f"Expected a whole checkpoint at `{path}`, got a file that torch cannot read"
            f" ({str(error).splitlines()[0]}). Leave it out of `paths`."
        ) from error
    _raw_weights(content, path)
    return content


def _raw_weights(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not {"state_dict", "global_step", "epoch"} <= content.keys():
        raise MissingEvidence(
            f"Expected `state_dict`, `global_step` and `epoch` in `{path}`, got {sorted(content)[:8]!r}."
            " Pass files that Lightning's `ModelCheckpoint` or `trainer.save_checkpoint` wrote."
            if isinstance(content, dict)
            else f"Expected a dict in `{path}`, got {type(content).__name__!r}."
        )
    weights: dict[str, Tensor] = content["current_model_state" if "current_model_state" in content else "state_dict"]
    return weights


def _groups_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for optimizer in content.get("optimizer_states", ()) for group in optimizer["param_groups"]]


def _stored_rates(groups: list[dict[str, Any]], path: Path) -> list[float]:
    if not groups:
        raise MissingEvidence(
            f"Expected an optimizer's state in `{path}`, got a file saved with weights only. Pass `learning_rates=`."
        )
    return [float(group["lr"]) for group in groups]


def _reconcile(rates: list[list[float]], groups: list[dict[str, Any]]) -> tuple[list[list[float]], dict[str, Any]]:
    """Learning rates and matching groups; a file rarely says which parameter was in which group."""
    if len({len(rate) for rate in rates}) > 1:
        raise ValueError(f"Expected as many learning rates at every checkpoint, got {[len(r) for r in rates]!r}.")
    named = bool(groups) and all("param_names" in group for group in groups) and len(groups) == len(rates[0])
    if not named and any(len(set(rate)) > 1 for rate in rates):
        raise MissingEvidence(
            f"Expected one learning rate for all parameters, got {rates[-1]!r}, and the files do not say which"
            " parameter was in which group. Pass `learning_rates=` with one number for each checkpoint."
        )
    described = [
        {key: value for key, value in group.items() if key not in ("params", "param_names", "lr")}
        | {"parameters": [clean(name) for name in group["param_names"]] if named else []}
        for group in groups
    ] or [{"parameters": [], "dampening": 0}]
    if not named:
        rates, described = [rate[:1] for rate in rates], described[:1]
    return rates, {"optimizer": 0, "kind": "unknown", "groups": described}
