"""What a tracker is: it is shown every micro-batch and every step of a running fit, and keeps what a method needs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.gradients import Engine
from lightning_influence.numerics.clipping import Clipping
from lightning_influence.numerics.optimizers import UpdateInput, UpdateRule
from lightning_influence.setting.setting import Queries
from lightning_influence.tracking.micro_batch import TrackedMicroBatch


class Untrackable(ValueError):
    """Something in this fit is beyond what a tracker can follow; the message says what, and what works instead."""


class PlanError(Untrackable):
    """A plan that takes more memory, disk or time than there is."""


@dataclass(frozen=True)
class TrackedFit:
    """What is known before the first step.

    Args:
        engine: gradients of training examples, with the plan of the self-check.
        n_train: training examples.
        steps: optimizer steps that the Trainer intends to make, or None.
        batch_sizes: examples of a micro-batch and micro-batches of a step, as far as the loader tells.
        uniform: whether the optimizer's derivatives are the same for every entry of a parameter (SGD).
        queries: all queries of ``Influence(queries=)``, or None.
        states: tensors that the optimizer keeps for each parameter.
        folder: of the tracker's own files.
        resumed: folder of the runs of the fit that is resumed, or None.
        free_disk: bytes that are free there.
        sample: a micro-batch of training examples, to time work on.
        seconds: of a plain forward and backward pass over it.
    """

    engine: Engine
    n_train: int
    steps: int | None
    batch_sizes: tuple[int | None, int]
    uniform: bool
    queries: Queries | None
    states: int
    folder: Path
    resumed: Path | None
    free_disk: int
    sample: Block
    seconds: float


@dataclass(frozen=True)
class TrackingPlan:
    """What tracking will take: bytes of memory and of disk, and times the plain step; None where it is not known."""

    memory: float | None
    disk: float | None
    steps: float | None

    def __str__(self) -> str:
        said = [
            "memory unknown" if self.memory is None else f"{self.memory / 2**20:,.1f} MiB of memory",
            "disk unknown" if self.disk is None else f"{self.disk / 2**20:,.1f} MiB of disk",
            "time unknown" if self.steps is None else f"about {self.steps:.2g} x the plain step on top of it",
        ]
        return ", ".join(said)


@dataclass(frozen=True)
class WeightUpdate:
    """How one step of the optimizer moved its parameters.

    Args:
        rule: the optimizer's.
        places: by parameter name, the place before the step; only those that had a gradient.
        clipping: what clipped the gradients, if anything did.
        raw: gradients by name before clipping.
    """

    rule: UpdateRule
    places: Mapping[str, UpdateInput]
    clipping: Clipping | None
    raw: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrackedStep:
    """One step of the optimizer.

    Args:
        made: updates of weights so far, this one included.
        batches: for each micro-batch whose gradients were added up, what ``Tracker.batch`` returned of it.
        ids: for each micro-batch, its examples.
        moved: how the weights moved, for trackers that differentiate it.
    """

    made: int
    batches: Sequence[Any]
    ids: Sequence[Sequence[int]]
    moved: WeightUpdate | None


@dataclass
class TrackerState:
    """What a tracker holds after some step, to be written or read back.

    Args:
        tensors: by name.
        facts: builtins.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Tracker(ABC):
    """Follows one fit for one method. Nothing it does may change training."""

    asks: ClassVar[bool] = False
    """Whether it looks at the queries after every step."""
    derives: ClassVar[bool] = True
    """Whether it differentiates the steps, which must then be what the optimizer's rule says."""

    @abstractmethod
    def starts(self, fit: TrackedFit, state: TrackerState | None) -> TrackingPlan:
        """Before the first step; ``state`` is what a resumed fit goes on from.

        Raises:
            Untrackable: this fit cannot be followed.
            PlanError: it could, but not with the memory, disk or time there is.
        """

    def batch(self, present: TrackedMicroBatch) -> Any:
        """A micro-batch is about to be trained on: what to keep of it until its step is made."""
        return None

    @abstractmethod
    def stepped(self, step: TrackedStep, queries: Queries | None) -> None:
        """The weights have moved; ``queries`` are taken at the new ones."""

    @abstractmethod
    def state(self) -> TrackerState:
        """Everything held, as of the last step."""

    def close(self) -> None:  # noqa: B027 - most hold nothing to let go of
        """Lets go of working files."""
