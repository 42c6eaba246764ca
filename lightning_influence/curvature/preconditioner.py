"""A stretch of a fit as preconditioned gradient descent: learning rates times Adam's preconditioner, per parameter."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.curvature.adam_state import ADAM, options_at, scale_of
from lightning_influence.curvature.damping import decay_at, of_group
from lightning_influence.curvature.descent import Descent
from lightning_influence.devices import wide_device
from lightning_influence.setting.setting import Setting, Stage
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.checkpoint import is_plain_sgd
from lightning_influence.types import MissingEvidence

_INSTEAD = "Use `HyDRA()`, or `InfluenceFunction(EKFAC())`."


def check_optimizers(trajectory: Trajectory) -> None:
    """Raise unless every step is a gradient times a preconditioner that can be read from the checkpoints.

    Raises:
        MissingEvidence: Adam's state is missing, since the trajectory was made from Lightning's own checkpoint files.
        ValueError: an optimizer other than SGD, Adam and AdamW, or one with ``maximize=True``.
    """
    refuse_maximising(trajectory)
    for entry in trajectory.settings:
        for group in entry["groups"]:
            if is_plain_sgd(group) or entry.get("kind") in ADAM:
                continue
            if "betas" in group and not trajectory.captured:
                raise _no_state("files that `Trajectory.from_checkpoints` read, which takes their weights only")
            raise ValueError(
                f"Expected a fit by SGD, Adam or AdamW, got `{entry.get('kind')}`, whose preconditioner is not known. "
                f"{_INSTEAD}"
            )


def refuse_maximising(trajectory: Trajectory | None) -> None:
    """Raise where an optimizer maximised what the step returns: formulas of a minimum would have the wrong sign."""
    settings = () if trajectory is None else trajectory.settings
    if any(group.get("maximize") for entry in settings for group in entry["groups"]):
        raise ValueError(
            "Expected a fit that minimises, got an optimizer with `maximize=True`. Return minus that value from "
            "`training_step` and fit without `maximize=True`, or use `HyDRA()`."
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
    added = of_group(decay_at(setting, stage) + damping, setting.engine.groups)
    rate, decay = (of_group(values, setting.engine.groups) for values in (reach, decoupled_decay))
    parameters = setting.engine.task.named_parameters()
    chosen = {name: parameters[name] for name in setting.engine.plan.names}
    like = {n: torch.ones(p.shape, dtype=torch.float64, device=wide_device(p.device)) for n, p in chosen.items()}
    scales = _preconditioner(setting, stage, like)
    return Descent(
        {name: rate(name) * scale for name, scale in scales.items()},
        {name: added(name) * one for name, one in like.items()},
        {name: decay(name) * (scale > 0).double() for name, scale in scales.items()},
    )


def _preconditioner(setting: Setting, stage: Stage, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By parameter: 1 under SGD, 1 / (√(mean squared gradient) + eps) under Adam, 0 where Adam has not moved a weight.

    A weight that has had no gradient yet would have 1 / eps. No step was ever made with that: the first gradient makes
    its own mean square. Rounding in an eigenbasis would also spread it over weights that do move.
    """
    trajectory = setting.trajectory
    assert trajectory is not None
    assert stage.position is not None
    if not trajectory.adaptive:
        return dict(like)
    checkpoint = trajectory.checkpoints[stage.position]
    state, options = checkpoint.load(), options_at(trajectory, checkpoint.step)
    adaptive = {name for name in like if name in options and not is_plain_sgd(dict(options[name]))}
    known = {name for name in adaptive if "exp_avg_sq" in state.optimizer.get(name, {})}
    if adaptive and not known:
        raise _no_state(f"none at step {checkpoint.step}", "" if checkpoint.whole else "keep='all'")
    still = sorted(adaptive - known)
    if still:
        setting.note(
            f"At the middle checkpoint of a segment (step {checkpoint.step}), Adam had not updated {', '.join(still)} "
            "yet: these parameters are taken as fixed throughout the segment"
        )
    return {
        name: scale_of(state, name, options[name]).to(one) if name in known else one * (name not in adaptive)
        for name, one in like.items()
    }


def _no_state(got: str, by: str = "") -> MissingEvidence:
    return MissingEvidence(
        f"Expected checkpoints with the state of Adam, which its preconditioner is computed from, got {got}. Fit with "
        f"`Trainer(callbacks=[Influence({by})])`, or use `InfluenceFunction(EKFAC())`."
    )
