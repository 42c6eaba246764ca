"""The diagonal that is added to a curvature: the fit's L2 weight decay, and a damping chosen by its length."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.adam_state import mean_roots
from lightning_influence.setting.exposure import exposure_before
from lightning_influence.setting.setting import Setting, Stage
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.checkpoint import is_decoupled
from lightning_influence.types import MissingEvidence

_SHARE = 0.1
# Within this factor of what the fit implies, a given diagonal makes scores at most about twice too large or small.
_NEAR = 4.0


@dataclass(frozen=True)
class Diagonal:
    """What is added to the curvature of the mean loss, for the parameters of each group of the optimizer.

    Args:
        decay: the L2 weight decay, [group] float64.
        damping: the damping besides it, [group] float64.
        reason: how the damping was chosen, for the notes.
        implied: the damping that stands for the length of the fit, [group]; None where it is not known. Only near it
            is a score a change of the loss: with a hundredth of it scores can be ten times larger.
    """

    decay: Tensor
    damping: Tensor
    reason: str
    implied: Tensor | None

    @property
    def is_near(self) -> bool:
        """Whether decay and damping together are what the fit implies, within a factor of 4."""
        if self.implied is None:
            return False
        expected = self.decay + self.implied
        return bool(((self.total <= _NEAR * expected) & (self.total >= expected / _NEAR)).all())

    @property
    def total(self) -> Tensor:
        """Weight decay plus damping, [group] float64."""
        return self.decay + self.damping


def diagonal_at(
    setting: Setting, stage: Stage, damping: float | None, mean_eigenvalue: Callable[[], float], share: float = 1.0
) -> Diagonal:
    r"""The diagonal to add at a checkpoint.

    If SGD with learning rates :math:`\eta_t` and momentum :math:`\mu` led to it, the default damping is
    :math:`1 / \sum_t \eta_t / (1 - \mu)`, which approximates SOURCE with one segment (Bae et al., 2024). After Adam or
    AdamW, whose steps are gradients over the root r of their mean squares, it is :math:`r / \sum_t \eta_t` by the same
    approximation, with the mean of r over the group (see ``mean_roots``); AdamW's decoupled decay of the weights adds
    its own :math:`r \lambda`. After other optimizers, or where no learning rates were captured, it is a tenth of the
    mean eigenvalue (Grosse et al., 2023), which knows nothing about the fit's length: scores then have no unit.

    Measured by exact leave-one-out after Adam on digits (tests/benchmarks/units.py), a tenth of the mean eigenvalue
    made EK-FAC's self-influence up to 8 times too large.

    Args:
        setting: holds the trajectory and the loss's reduction.
        stage: the checkpoint.
        damping: the user's own, or None for the default.
        mean_eigenvalue: computes the mean eigenvalue; called only if the default needs it.
        share: the fraction of the default by learning rates to use; see ``Curvature.share``.
    """
    decay = decay_at(setting, stage)
    implied, reason = _by_the_fit(setting, stage)
    if damping is not None:
        return Diagonal(decay, torch.full_like(decay, float(damping)), "given", implied)
    if implied is not None:
        times = "" if share == 1 else f"{share:g} x "
        return Diagonal(decay, share * implied, f"{times}{reason}", implied)
    tenth = torch.full_like(decay, _SHARE * mean_eigenvalue())
    return Diagonal(decay, tenth, f"0.1 x mean eigenvalue, since {reason}", None)


def _by_the_fit(setting: Setting, stage: Stage) -> tuple[Tensor | None, str]:
    """The damping that the fit's length implies, [group], and how; or None, and why there is none."""
    trajectory, position = setting.trajectory, stage.position
    reach = None if trajectory is None or position is None else reach_at(setting, position)
    if reach is None:
        return None, "no learning rates were captured"
    assert trajectory is not None
    assert position is not None
    if not bool((reach > 0).all()):
        return None, "the optimizer is adaptive" if trajectory.adaptive else "a group has no positive learning rate"
    if not trajectory.adaptive:
        return 1 / reach, "1 / (sum of learning rates / (1 - momentum))"
    roots = mean_roots(setting, stage) if trajectory.captured else None
    if roots is None:
        kept = "" if trajectory.checkpoints[position].whole else "; `Influence(keep='all')` keeps it"
        return None, f"the optimizer is adaptive and its state is not known{kept}"
    shrunk = torch.stack([trajectory.shrinkage(k) for k in range(position + 1)]).sum(0)
    return roots * (1 + shrunk) / reach, "Adam's mean root of mean squares / sum of learning rates"


def decay_at(setting: Setting, stage: Stage) -> Tensor:
    """The L2 weight decay that the optimizer had at a checkpoint, [group] float64; 0 where nothing is known."""
    trajectory, position = setting.trajectory, stage.position
    if trajectory is None or position is None:
        return torch.zeros(1, dtype=torch.float64)
    return _decay(setting, trajectory, position)


def reach_at(setting: Setting, position: int, reduction: Any = None) -> Tensor | None:
    """[group]: the sum of the learning rates of all steps up to a checkpoint, with momentum and clipping applied.

    Scaled to steps along the mean gradient of their examples; None if there was no step before the checkpoint.
    """
    trajectory = setting.trajectory
    if trajectory is None or trajectory.checkpoints[position].step == 0 or trajectory.broken is not None:
        return None
    known: dict[tuple[int, Any], Tensor] = setting.state("reach", dict)
    for index in range(position + 1):
        if (index, reduction) not in known:
            known[index, reduction] = exposure_before(setting, index, reduction).sum(1)
    return torch.stack([known[index, reduction] for index in range(position + 1)]).sum(0)


def _decay(setting: Setting, trajectory: Trajectory, position: int) -> Tensor:
    """[group]: the coefficient of |w|^2 / 2 besides the mean loss; for a summed loss, divided by the batch size."""
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
        if trajectory.broken is not None:
            raise MissingEvidence(
                "Expected the batch sizes of the fit for the weight decay beside a loss that sums over its batch, got "
                f"none. {trajectory.broken} Fit again, or average the loss."
            )
        if summed is not None and mean is not None:
            decay *= torch.where(summed != 0, mean / summed, torch.ones_like(mean))
    return decay


def of_group(values: Tensor, groups: Mapping[str, int]) -> Callable[[str], float]:
    """A function from a parameter's name to the value of its group, given values [group]."""
    held: Sequence[float] = values.tolist()
    return lambda name: held[groups.get(name, 0)]
