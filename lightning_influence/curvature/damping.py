"""What is added to a curvature's diagonal: the fit's L2 weight decay, and a damping that follows its learning rates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.setting.setting import Setting, Stage
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.checkpoint import is_decoupled

_SHARE = 0.1


@dataclass(frozen=True)
class Diagonal:
    """What is added for the parameters of each of the optimizer's groups, in units of the mean loss's curvature.

    Args:
        decay: L2 weight decay, [group] float64.
        damping: besides it, [group] float64.
        why: where the damping comes from, for the notes.
    """

    decay: Tensor
    damping: Tensor
    why: str

    @property
    def total(self) -> Tensor:
        """[group] float64."""
        return self.decay + self.damping


def diagonal_at(
    setting: Setting, stage: Stage, damping: float | None, mean_eigenvalue: Callable[[], float], share: float = 1.0
) -> Diagonal:
    r"""The diagonal at a stage.

    Where plain SGD with learning rates :math:`\eta_t` and momentum :math:`\mu` led there, the damping is
    :math:`1 / \sum_t \eta_t / (1 - \mu)`: with it an influence function is SOURCE with one segment (Bae et al., 2024).
    Under other optimizers, or where nothing was captured, it is a tenth of the mean eigenvalue (Grosse et al., 2023).

    Args:
        setting: the question's.
        stage: where.
        damping: the user's own, or None for the rule.
        mean_eigenvalue: gives it, where it is needed.
        share: of the rule by learning rates that is taken; see ``Curvature.share``.
    """
    trajectory, position = setting.trajectory, stage.position
    if trajectory is None or position is None:
        decay = torch.zeros(1, dtype=torch.float64)
        reach = None
    else:
        decay = _decay(setting, trajectory, position)
        reach = reach_at(setting, position)
    if damping is not None:
        return Diagonal(decay, torch.full_like(decay, float(damping)), "given")
    if reach is not None and not trajectory.adaptive and bool((reach > 0).all()):  # type: ignore[union-attr]
        times = "" if share == 1 else f"{share:g} x "
        return Diagonal(decay, share / reach, f"{times}1 / (sum of learning rates / (1 - momentum))")
    known = "the optimizer is adaptive" if reach is not None else "no learning rates were captured"
    return Diagonal(decay, torch.full_like(decay, _SHARE * mean_eigenvalue()), f"0.1 x mean eigenvalue, since {known}")


def reach_at(setting: Setting, position: int, reduction: Any = None) -> Tensor | None:
    """[group]: the sum of the steps' learning rates up to a checkpoint, momentum and clipping included.

    In units where a step moves by the mean gradient of its examples; None where no step came before.
    """
    trajectory = setting.trajectory
    if trajectory is None or trajectory.checkpoints[position].step == 0:
        return None
    reduction = reduction or setting.engine.reduction.coefficient()
    until = range(position + 1)
    exposures = [trajectory.exposure(i, reduction, setting.n_train, setting.batches_per_epoch) for i in until]
    return torch.stack([exposure.sum(1) for exposure in exposures]).sum(0)


def _decay(setting: Setting, trajectory: Trajectory, position: int) -> Tensor:
    """[group]: the coefficient of |w|^2 / 2 beside the mean loss; a summed loss has it divided by the batch size."""
    decay = torch.zeros(max(1, trajectory.n_groups), dtype=torch.float64)
    first = 0
    for optimizer in sorted({entry["optimizer"] for entry in trajectory.settings}):
        last = [entry for entry in trajectory.settings if entry["optimizer"] == optimizer][-1]
        for group, options in enumerate(last["groups"], start=first):
            if not is_decoupled(last, options):
                decay[group] = float(options.get("weight_decay") or 0.0)
        first += max(len(e["groups"]) for e in trajectory.settings if e["optimizer"] == optimizer)
    if setting.engine.reduction.coefficient() == "sum" and bool(decay.any()):
        summed, mean = (reach_at(setting, position, reduction) for reduction in ("sum", "mean"))
        if summed is not None and mean is not None:
            decay *= torch.where(summed != 0, mean / summed, torch.ones_like(mean))
    return decay


def of_group(values: Tensor, groups: Mapping[str, int]) -> Callable[[str], float]:
    """Which of [group] values a parameter has, by its name."""
    held: Sequence[float] = values.tolist()
    return lambda name: held[groups.get(name, 0)]
