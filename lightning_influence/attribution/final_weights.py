"""Which weights count as the final ones: the last, the best, averaged ones or those in a file."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightning_influence.attribution.arguments import AGAIN, follows_the_fit
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.setting.session import Session
from lightning_influence.trajectory import (
    BestFile,
    Checkpoint,
    LightningCheckpoint,
    Trajectory,
    best_of,
    deployed,
    fitted_checkpoint,
)
from lightning_influence.trajectory.ended import ended_with
from lightning_influence.types import MissingEvidence

_NOT_AVERAGED = (
    "Scores are about the raw weights after the last step, not about the average that a callback put in their"
    " place; for that, pass `Attributor(weights='averaged')`."
)
_BY_PATH = "Pass `weights=` a path of the `.ckpt` file instead."


@dataclass(frozen=True)
class FinalWeights:
    """What methods that need the final weights alone work on.

    Args:
        asked: the weights, as the user wrote it.
        fit: the fit itself.
        end: the fit as if it had ended with these weights.
        note: which they are; None for the last.
    """

    asked: str
    fit: Session
    end: Session
    note: str | None = None

    def session_of(self, method: Method) -> Session:
        """The session in which a method computes."""
        return self.fit if _follows_the_fit(method) else self.end

    def notes_for(self, method: Method) -> list[str]:
        """Which weights the scores of a method are about."""
        if self.note is None or (self.asked == "last" and _follows_the_fit(method)):
            return []
        if not _follows_the_fit(method):
            return [self.note]
        return [
            f"`weights={self.asked!r}` does not change `{method.name}`, which follows the weights of the fit itself, up"
            " to the last ones."
        ]


def _follows_the_fit(method: Method) -> bool:
    """Whether a method uses more of the fit than its final weights."""
    return follows_the_fit(method) or bool(method.needs & Evidence.REFIT)


def final_weights(weights: str | os.PathLike[str], fit: Session) -> FinalWeights:
    """The weights that count as the final ones.

    Raises:
        ValueError: neither a word nor a file, or a file of another module.
        MissingEvidence: they were not recorded, or are no longer where they were.
    """
    trajectory = fit.trajectory
    if weights == "last" and trajectory is not None and trajectory.broken is not None and trajectory.path is not None:
        raise MissingEvidence(
            f"Expected the last weights of the fit, got a record without. {trajectory.broken} {AGAIN}"
        )
    if weights == "last":
        averaged = trajectory is not None and trajectory.averaged is not None
        return FinalWeights("last", fit, fit, _NOT_AVERAGED if averaged else None)
    if weights == "best":
        checkpoint, note = _best(trajectory, fit.trainer)
    elif weights == "averaged":
        checkpoint, note = _averaged(trajectory)
    elif isinstance(weights, os.PathLike) or (
        isinstance(weights, str) and (weights.endswith(".ckpt") or os.path.isfile(weights))
    ):
        path = Path(weights)
        checkpoint, note = deployed(path), f"Scores are about the weights in `{path}`."
    else:
        raise ValueError(
            f"Expected `weights` to be 'last', 'best', 'averaged' or the path of a `.ckpt` file, got {weights!r}."
        )
    if isinstance(checkpoint, LightningCheckpoint):
        checkpoint, notes = fitted_checkpoint(checkpoint, fit.module)
        note = " ".join([note, *notes])
    ended = None if trajectory is None else ended_with(trajectory, checkpoint)
    return FinalWeights(os.fspath(weights), fit, fit.ending_with(checkpoint, ended), note)


def _averaged(trajectory: Trajectory | None) -> tuple[Checkpoint, str]:
    note = "Scores are about the averaged weights at the end of the fit."
    if trajectory is not None and trajectory.averaged is not None:
        return trajectory.averaged, note
    last = None if trajectory is None else trajectory.checkpoints[-1]
    if isinstance(last, LightningCheckpoint):
        averaged = replace(last, which="averaged", prefix="", own={})
        averaged.load()
        return averaged, f"Scores are about the averaged weights in `{last.path}`."
    raise MissingEvidence(
        "Expected averaged weights with `weights='averaged'`, got "
        + ("`trajectory=None`" if trajectory is None else "a fit in which none were recorded")
        + ": `Influence` records those of Lightning's `WeightAveraging`, `EMAWeightAveraging` and "
        f"`StochasticWeightAveraging` when a fit ends. {_BY_PATH}"
    )


def _best(trajectory: Trajectory | None, trainer: Any) -> tuple[Checkpoint, str]:
    best = _best_file(trajectory, trainer)
    if best is None:
        raise MissingEvidence(
            "Expected a file of `ModelCheckpoint` with `weights='best'`, got a fit that kept none (or was recorded by "
            f"an earlier version). {_BY_PATH}"
        )
    note = f"Scores are about the weights that `ModelCheckpoint` found best by {best.monitor!r}"
    if not best.monitor:
        note = "Scores are about the newest weights of `ModelCheckpoint`, which has no `monitor=` to tell the best by"
    path, own = Path(best.path), _own_checkpoint(trajectory, best)
    if path.is_file():
        found = deployed(path)
        if best.global_step not in (None, found.step) or not _same(found, own):
            raise MissingEvidence(
                f"Expected the best checkpoint of this fit, of step {best.global_step}, in `{path}`, got one of step "
                f"{found.step} with other weights: another fit, or a callback with weights of its own, wrote it. "
                f"{_BY_PATH}"
            )
        found = replace(found, step=found.step if best.step is None else best.step)
        return found, f"{note}: `{path}`, step {found.step}."
    if own is not None:
        return own, f"{note}, step {own.step}: those that `Influence` saved, since `{path}` is not there any more."
    raise MissingEvidence(f"Expected the best checkpoint of the fit at `{path}`, got nothing there. {_BY_PATH}")


def _best_file(trajectory: Trajectory | None, trainer: Any) -> BestFile | None:
    """As recorded, else as the Trainer knows it now, else as the last file says."""
    if trajectory is not None and trajectory.best is not None:
        return trajectory.best
    callback = getattr(trainer, "checkpoint_callback", None)
    path = getattr(callback, "best_model_path", "")
    if path:
        return BestFile(path, getattr(callback, "monitor", None))
    last = None if trajectory is None else trajectory.checkpoints[-1]
    return best_of(last.path) if isinstance(last, LightningCheckpoint) else None


def _own_checkpoint(trajectory: Trajectory | None, best: BestFile) -> Checkpoint | None:
    """The run's own checkpoint of the same step, unless the file has averaged weights."""
    if trajectory is None or best.step is None or best.averaged:
        return None
    return next((checkpoint for checkpoint in trajectory.checkpoints if checkpoint.step == best.step), None)


def _same(found: Checkpoint, own: Checkpoint | None) -> bool:
    if own is None:
        return True
    one, other = found.load().parameters, own.load().parameters
    return all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys())
