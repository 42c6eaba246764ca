"""A stretch of a fit as preconditioned gradient descent: learning rates times Adam's preconditioner, per parameter."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.damping import diagonal_at, of_group
from lightning_influence.curvature.descent import Descent
from lightning_influence.setting.setting import Setting, Stage
from lightning_influence.trajectory import SavedState, Trajectory
from lightning_influence.trajectory.checkpoint import is_plain_sgd
from lightning_influence.types import MissingEvidence

_ADAM = ("Adam", "AdamW")
_INSTEAD = "Use `HyDRA()`, or `InfluenceFunction(EKFAC())`."


def check_optimizers(trajectory: Trajectory) -> None:
    """Raise unless every step is a gradient times a preconditioner that can be read from the checkpoints.

    Raises:
        MissingEvidence: Adam's state is missing, since the trajectory was made from Lightning's own checkpoint files.
        ValueError: an optimizer other than SGD, Adam and AdamW, or one with ``maximize=True``.
    """
    for entry in trajectory.settings:
        for group in entry["groups"]:
            if group.get("maximize"):
                raise ValueError(f"Expected a fit that minimises, got an optimizer with `maximize=True`. {_INSTEAD}")
            if is_plain_sgd(group) or entry.get("kind") in _ADAM:
                continue
            if "betas" in group and not trajectory.captured:
                raise _no_state("files that `Trajectory.from_checkpoints` read, which takes their weights only")
            raise ValueError(
                f"Expected a fit by SGD, Adam or AdamW, got `{entry.get('kind')}`, whose preconditioner is not known. "
                f"{_INSTEAD}"
            )


def descent_at(setting: Setting, stage: Stage, damping: float, reach: Tensor, decoupled_decay: Tensor) -> Descent:
    """A stretch of training, with the optimizer's state at one checkpoint in it.

    Args:
        setting: holds the trajectory and takes notes.
        stage: the checkpoint.
        damping: added to the curvature's diagonal besides the fit's L2 weight decay.
        reach: [group] float64, sums of learning rates (see ``reach_at``).
        decoupled_decay: [group] float64, sums of learning rates times decoupled weight decay.

    Raises:
        MissingEvidence: the checkpoint lacks the state of an adaptive optimizer.
    """
    added = of_group(diagonal_at(setting, stage, damping, lambda: 0.0).total, setting.engine.groups)
    rate, decay = (of_group(values, setting.engine.groups) for values in (reach, decoupled_decay))
    parameters = setting.engine.task.named_parameters()
    like = {name: torch.ones_like(parameters[name], dtype=torch.float64) for name in setting.engine.plan.names}
    scales = _preconditioner(setting, stage, like)
    return Descent(
        {name: rate(name) * scale for name, scale in scales.items()},
        {name: added(name) * one for name, one in like.items()},
        {name: decay(name) * (scale > 0).double() for name, scale in scales.items()},
    )


def _preconditioner(setting: Setting, stage: Stage, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By parameter: 1 under SGD, 1 / (√(mean squared gradient) + eps) under Adam, 0 before Adam's first step."""
    trajectory = setting.trajectory
    assert trajectory is not None
    assert stage.position is not None
    if not trajectory.adaptive:
        return dict(like)
    checkpoint = trajectory.checkpoints[stage.position]
    state, options = checkpoint.load(), _options_at(trajectory, checkpoint.step)
    adaptive = {name for name in like if name in options and not is_plain_sgd(dict(options[name]))}
    known = {name for name in adaptive if "exp_avg_sq" in state.optimizer.get(name, {})}
    if adaptive and not known:
        raise _no_state(f"none at step {checkpoint.step}")
    still = sorted(adaptive - known)
    if still:
        setting.note(
            f"At the middle checkpoint of a segment (step {checkpoint.step}), Adam had not updated {', '.join(still)} "
            "yet: these parameters are taken as fixed throughout the segment"
        )
    return {
        name: _scale(state, name, options[name]).to(one) if name in known else one * (name not in adaptive)
        for name, one in like.items()
    }


def _scale(state: SavedState, name: str, options: Mapping[str, Any]) -> Tensor:
    own = state.optimizer[name]
    square = own.get("max_exp_avg_sq", own["exp_avg_sq"]).double()
    corrected = 1.0 - options["betas"][1] ** float(own["step"])
    return 1 / (square.sqrt() / math.sqrt(corrected) + options["eps"])


def _options_at(trajectory: Trajectory, step: int) -> dict[str, Mapping[str, Any]]:
    """By parameter, the options of its parameter group at a step."""
    used: dict[int, Mapping[str, Any]] = {}
    for number, entry in zip(*(trajectory.steps[name].to_pylist() for name in ("step", "settings")), strict=True):
        if number <= step:
            used[trajectory.settings[entry]["optimizer"]] = trajectory.settings[entry]
    return {name: group for entry in used.values() for group in entry["groups"] for name in group["parameters"]}


def _no_state(got: str) -> MissingEvidence:
    return MissingEvidence(
        f"Expected checkpoints with the state of Adam, which its preconditioner is computed from, got {got}. Fit with "
        "`Trainer(callbacks=[Influence()])`, or use `InfluenceFunction(EKFAC())`."
    )
