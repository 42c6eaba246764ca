"""What is known of a fit whose record broke off: its last weights, in memory, and the options of its optimizers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_influence.trajectory import Checkpoint, Trajectory
from lightning_influence.trajectory.checkpoint import SavedState
from lightning_influence.trajectory.files import STEPS


@dataclass(frozen=True)
class HeldCheckpoint(Checkpoint):
    """A checkpoint that was never written."""

    state: SavedState | None = field(default=None, repr=False)

    def load(self) -> SavedState:
        """The state itself."""
        assert self.state is not None
        return self.state


def last_weights(
    step: int,
    epoch: int,
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
    why: str,
) -> Trajectory:
    """A trajectory of the last weights alone, for methods that need nothing else.

    Args:
        step: the last.
        epoch: the last.
        state: as ``gather_state`` returns it.
        manifest: of the run, with the settings of the whole fit.
        why: the record broke off.
    """
    broken = f"The record of this fit broke off: {why}"
    note = "Scores are of its last weights, from memory; checkpoints, batch order and learning rates are missing."
    kept: dict[str, dict[str, Any]] = {"optimizer": {}, "random": {}}  # of no use without steps
    held = HeldCheckpoint(step, epoch, Path("memory"), state=SavedState(**{**state, **kept}))
    return Trajectory(
        path=None,
        checkpoints=(held,),
        dataset_size=manifest["dataset_size"],
        steps=STEPS.empty_table(),
        settings=tuple(manifest["settings"]),
        notes=(*(n for n in manifest["notes"] if n != manifest.get("broken")), f"{broken} {note}"),
        finished=True,
        fit_seconds=manifest["fit_seconds"],
        eval_modules=tuple(manifest.get("eval_modules", ())),
        trainer_values=tuple((at, values) for at, values in manifest["trainer"]),
        broken=broken,
    )
