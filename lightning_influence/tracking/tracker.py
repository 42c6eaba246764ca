"""The interface of trackers, which see each micro-batch and each step of a fit and keep what a method needs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.gradients import Engine
from lightning_influence.numerics.clipping import Clipping
from lightning_influence.numerics.optimizers import UpdateInput, UpdateRule
from lightning_influence.setting.setting import Queries
from lightning_influence.tracking.errors import PlanError
from lightning_influence.tracking.micro_batch import PreparedTask, TrackedMicroBatch


@dataclass(frozen=True)
class TrackedFit:
    """What a tracker knows of a fit before the first step.

    Args:
        engine: computes gradients of training examples.
        n_train: number of training examples.
        steps: optimizer steps that the Trainer plans, or None if unknown.
        batch_sizes: examples per micro-batch (None if unknown) and micro-batches per step.
        uniform: whether the optimizer's derivatives are the same for all entries of a parameter (SGD).
        queries: all queries of ``Influence(queries=)``, or None.
        states: tensors in the optimizer state per parameter.
        folder: for the tracker's files.
        resumed: folder that holds the run that is resumed, or None.
        free_disk: bytes free in ``folder``.
        sample: a micro-batch of training examples, for timing.
        seconds: time of a plain forward and backward pass over ``sample``.
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

    def micro_batch(self) -> TrackedMicroBatch:
        """The sample as ``Tracker.batch`` receives micro-batches."""
        engine = replace(self.engine, task=PreparedTask.of(self.engine.task))
        batch = self.engine.task.to_device(self.sample.batch)
        return TrackedMicroBatch(engine, tuple(self.sample.ids), batch, 1.0 / self.sample.size)

    def check_disk(self, plan: "TrackingPlan", content: str, instead: str) -> None:
        """Compare the disk space that a plan needs with what is free.

        Args:
            plan: of the tracker.
            content: what it writes.
            instead: what the user can do about it.

        Raises:
            PlanError: there is too little.
        """
        if plan.disk is not None and plan.disk > self.free_disk:
            raise PlanError(
                f"Expected {content} to fit the {self.free_disk / 2**20:,.0f} MiB free in `{self.folder}`, got {plan}. "
                f"{instead}"
            )


@dataclass(frozen=True)
class TrackingPlan:
    """Estimated cost: bytes of memory and disk, and time relative to the plain step; None where unknown."""

    memory: float | None
    disk: float | None
    steps: float | None

    def __str__(self) -> str:
        memory = "memory unknown" if self.memory is None else f"{self.memory / 2**20:,.1f} MiB of memory"
        disk = "disk unknown" if self.disk is None else f"{self.disk / 2**20:,.1f} MiB of disk"
        time = "time unknown" if self.steps is None else f"about {self.steps:.2g} times the plain step in addition"
        return f"{memory}, {disk}, {time}"


@dataclass(frozen=True)
class WeightUpdate:
    """How one optimizer step changed the parameters.

    Args:
        rule: update rule of the optimizer.
        inputs: arguments of the rule, by name of the parameter; only parameters that had a gradient.
        clipping: how gradients were clipped, or None.
        raw: gradients before clipping, by name.
    """

    rule: UpdateRule
    inputs: Mapping[str, UpdateInput]
    clipping: Clipping | None
    raw: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrackedStep:
    """One optimizer step.

    Args:
        made: weight updates so far, including this one.
        batches: what ``Tracker.batch`` returned for each micro-batch whose gradients were summed.
        ids: of the examples of each of these micro-batches.
        update: how the weights changed, for trackers that differentiate it.
    """

    made: int
    batches: Sequence[Any]
    ids: Sequence[Sequence[int]]
    update: WeightUpdate | None


@dataclass
class TrackerState:
    """Everything a tracker holds after a step, as it is written to disk.

    Args:
        tensors: by name.
        facts: builtins, by name.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Tracker(ABC):
    """Follows one fit for one method, without changing the fit."""

    sees_queries: ClassVar[bool] = False
    """Whether ``stepped`` is given the queries at the new weights."""
    differentiates: ClassVar[bool] = True
    """Whether it differentiates the steps, which must then follow the optimizer's update rule."""
    hessian: bool = False
    """Whether it includes how a change of the weights changes later gradients."""

    def chosen(self, fit: TrackedFit) -> "Tracker":
        """The tracker to use for this fit, which may depend on its optimizer."""
        return self

    @abstractmethod
    def starts(self, fit: TrackedFit, state: TrackerState | None) -> TrackingPlan:
        """Prepare for the first step.

        Args:
            fit: what is known of the fit.
            state: of this tracker at the step that the fit resumes from, or None.

        Returns:
            The estimated cost.

        Raises:
            Untrackable: this fit cannot be tracked.
            PlanError: tracking would exceed memory or disk.
        """

    def batch(self, present: TrackedMicroBatch) -> Any:
        """Return what to keep of a micro-batch, before its forward pass, until its step is made."""
        return None

    @abstractmethod
    def stepped(self, step: TrackedStep, queries: Queries | None) -> None:
        """The weights were updated; ``queries`` are evaluated at the new ones."""

    @abstractmethod
    def state(self) -> TrackerState:
        """Everything the tracker holds after the last step."""

    def close(self) -> None:  # noqa: B027 - most trackers hold no files
        """Release working files."""
