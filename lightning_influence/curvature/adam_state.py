"""How large Adam's steps are per parameter, from the second moments that a checkpoint has of its gradients."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.setting.setting import Setting, Stage
from lightning_influence.trajectory import SavedState, Trajectory
from lightning_influence.trajectory.checkpoint import is_plain_sgd

ADAM = ("Adam", "AdamW")


def options_at(trajectory: Trajectory, step: int) -> dict[str, Mapping[str, Any]]:
    """By parameter, the options of its parameter group at a step."""
    used: dict[int, Mapping[str, Any]] = {}
    for number, entry in zip(*(trajectory.steps[name].to_pylist() for name in ("step", "settings")), strict=True):
        if number <= step:
            used[trajectory.settings[entry]["optimizer"]] = trajectory.settings[entry]
    return {name: group for entry in used.values() for group in entry["groups"] for name in group["parameters"]}


def root_of(state: SavedState, name: str, options: Mapping[str, Any]) -> Tensor:
    """What Adam divides the gradients of a parameter by: root of their mean squares plus eps, [*shape] float64."""
    own = state.optimizer[name]
    square = own.get("max_exp_avg_sq", own["exp_avg_sq"]).double()
    corrected = 1.0 - options["betas"][1] ** float(own["step"])
    return square.sqrt() / math.sqrt(corrected) + options["eps"]


def scale_of(state: SavedState, name: str, options: Mapping[str, Any]) -> Tensor:
    """What Adam multiplies the gradients of a parameter by, [*shape] float64; 0 where it has had none yet."""
    squares = state.optimizer[name]["exp_avg_sq"]
    return torch.where(squares > 0, 1 / root_of(state, name, options), 0.0)


def mean_roots(setting: Setting, stage: Stage) -> Tensor | None:
    """[group] float64: what the optimizer divides gradients by at a checkpoint, one number for each group.

    1 under SGD. Under Adam it is the mean over the parameters, each weighted with its own root, so that those which
    hardly get gradients (dead inputs, rare tokens), and in which no gradient has a component, do not count.

    None where it is not known: another optimizer, one with a ``step`` of its own, or a checkpoint without its state.
    """
    trajectory = setting.trajectory
    assert trajectory is not None
    assert stage.position is not None
    if not all(_is_known(entry) for entry in trajectory.settings):
        return None
    checkpoint = trajectory.checkpoints[stage.position]
    state, options = checkpoint.load(), options_at(trajectory, checkpoint.step)
    totals = torch.zeros(2, max(1, trajectory.n_groups), dtype=torch.float64)
    parameters = setting.engine.task.named_parameters()
    for name in setting.engine.plan.names:
        own = options.get(name)
        if own is None:
            continue
        if is_plain_sgd(dict(own)):
            sums = [float(parameters[name].numel())] * 2
        elif "exp_avg_sq" in state.optimizer.get(name, {}):
            root = root_of(state, name, own)
            sums = [float(root.square().sum()), float(root.sum())]
        else:  # not updated yet
            continue
        totals[:, setting.engine.groups.get(name, 0)] += torch.tensor(sums, dtype=torch.float64)
    return totals[0] / totals[1] if bool((totals > 0).all() and totals.isfinite().all()) else None


def _is_known(entry: Mapping[str, Any]) -> bool:
    adam = entry.get("kind") in ADAM
    return not entry.get("own_step") and all(adam or is_plain_sgd(group) for group in entry["groups"])
