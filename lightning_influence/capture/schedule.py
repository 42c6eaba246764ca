"""When the checkpoints of a fit are saved, what they hold, and what they will weigh."""

import math
from dataclasses import dataclass
from typing import Any

from lightning_influence.types import bytes_in


@dataclass(frozen=True)
class Schedule:
    """When checkpoints are saved, with the names of `ModelCheckpoint`; 0 disables it.

    Args:
        every_n_epochs: see `Influence`.
        every_n_train_steps: see `Influence`.
        keep_last: see `Influence`.
        states: whether each holds the optimizer's state; otherwise the first does, and those of the last epoch.
    """

    every_n_epochs: int
    every_n_train_steps: int
    keep_last: int | None = None
    states: bool = True

    def holds_state(self, trainer: Any, kind: str) -> bool:
        """Whether a checkpoint that is saved now holds the optimizer's state; True as well if there is none."""
        return self.states or kind != "scheduled" or is_ending(trainer) or not any(o.state for o in trainer.optimizers)

    def weight(self, trainer: Any, first: int) -> str:
        """A sentence on what the checkpoints of a fit that begins will weigh.

        Args:
            trainer: of the fit.
            first: bytes of the initial checkpoint.
        """
        held = sum(bytes_in(list(optimizer.state.values())) for optimizer in trainer.optimizers)
        state = max(held, sum(_expected_state(optimizer) for optimizer in trainer.optimizers))
        count, weights = self._count(trainer), first - held
        text = f"A checkpoint of this fit takes {_shown(weights + state * self.states)}"
        if state:
            text += f", {_shown(state)} of it the optimizer's state" if self.states else ""
            text += "" if self.states else f", those of the last epoch {_shown(weights + state)}"
        if not math.isfinite(count):
            return f"{text}. How many there will be is not known."
        total = count * weights + ((count - 1) * state if self.states else state) + held
        return f"{text}; {count:.0f} of them about {_shown(total)}."

    def _count(self, trainer: Any) -> float:
        """How many checkpoints there will be, with the initial and the last one; infinite if the fit has no end."""
        try:
            steps, begun = float(trainer.estimated_stepping_batches), trainer.current_epoch
        except Exception:  # such as of a schedule of accumulation
            return math.inf
        found = 0.0
        if self.every_n_train_steps:
            found = (steps - trainer.global_step) / self.every_n_train_steps
        elif self.every_n_epochs:
            epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
            if trainer.max_steps not in (None, -1):  # how many of them is not known
                epochs = min(epochs, begun + steps / max(1.0, _steps_of_an_epoch(trainer)))
            found = epochs / self.every_n_epochs - begun // self.every_n_epochs
        count = math.ceil(found) if math.isfinite(found) else found
        most = math.inf if self.keep_last is None else self.keep_last
        return 1 + min(most, max(1, count))


def is_ending(trainer: Any) -> bool:
    """Whether the present epoch or step is the last one."""
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    last_step = trainer.max_steps not in (None, -1) and trainer.global_step >= trainer.max_steps
    return bool(trainer.should_stop or last_epoch or last_step)


def _steps_of_an_epoch(trainer: Any) -> float:
    return float(trainer.num_training_batches) / max(1, trainer.accumulate_grad_batches)


def _expected_state(optimizer: Any) -> int:
    """The bytes that an optimizer's state will take: of Adam and its kin, of momentum; 0 for all others."""
    found = 0
    for group in optimizer.param_groups:
        copies = 2 + bool(group.get("amsgrad")) if "betas" in group else int(bool(group.get("momentum")))
        found += copies * bytes_in([p for p in group["params"] if p.requires_grad])
    return found


def _shown(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.0f} kB"
