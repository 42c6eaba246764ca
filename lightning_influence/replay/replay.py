"""Walks a captured fit again, step by step, and measures how far it strays from the captured checkpoints."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.gradients import Engine
from lightning_influence.module.trainer_state import set_clock
from lightning_influence.replay.forward import Forward
from lightning_influence.replay.steps import Segment, Step, segments_of
from lightning_influence.replay.training_state import TrainingState
from lightning_influence.trajectory import Checkpoint, Trajectory

MAX_DRIFT = 0.1
"""A replay that strays further than this share of the distance that the weights moved is not that fit."""
# Above this many units of the weights' last place, relative to the distance moved, drift is no rounding.
_ROUNDING = 1e4
# Bytes of states that may be held at once while a stretch of steps is walked backwards.
_HELD = 2**29


class DriftError(RuntimeError):
    """Replayed weights are not those that the fit had."""


@dataclass(frozen=True)
class ReplayedStep:
    """One step of the replay.

    Args:
        step: what was captured of it.
        before: the state that it starts from.
        gradients: by parameter name, before clipping; what the loss does not reach is absent.
    """

    step: Step
    before: TrainingState
    gradients: dict[str, Tensor]


@dataclass
class Replay:
    """A captured fit that can be run again.

    Args:
        engine: of the quiet module, with the plan of the self-check; all parameters that trained must be in it.
        examples: the training dataset.
        trajectory: of the fit.
        max_drift: see ``MAX_DRIFT``.

    Raises:
        MissingEvidence: the fit was not captured step by step.
        ValueError: an optimizer without a rule, settings beyond it, or only some of the parameters that trained.
    """

    engine: Engine
    examples: Examples
    trajectory: Trajectory | None
    max_drift: float = MAX_DRIFT
    segments: list[Segment] = field(init=False)
    _loaded: dict[int, TrainingState] = field(init=False, default_factory=dict)
    whole: bool = field(init=False, default=True)
    """Whether this is the captured fit itself, with its checkpoints, and not the fit without some examples."""
    drifts: dict[int, float] = field(init=False, default_factory=dict)
    """By the step of each checkpoint met: distance from it, relative to the distance moved since the one before."""

    def __post_init__(self) -> None:
        self.segments = segments_of(self.trajectory)
        self.forward = Forward(self.engine, self.examples)
        trained = {name for step in self.steps for name in step.moves.options}
        left_out = sorted(trained - set(self.engine.plan.names))
        if left_out:
            raise ValueError(
                f"Expected every parameter that trained to count, got `parameters=` without `{left_out[0]}`"
                f"{f' and {len(left_out) - 1} more' if len(left_out) > 1 else ''}: a change of one weight moves all "
                "others in the steps after it. Leave `parameters` out."
            )
        self.engine.width(self.examples)  # while the module is in eval mode

    @property
    def drift(self) -> float:
        """The largest so far."""
        return max(self.drifts.values(), default=0.0)

    @property
    def steps(self) -> list[Step]:
        """All steps in their order."""
        return [step for segment in self.segments for step in segment.steps]

    def training(self) -> contextlib.AbstractContextManager[None]:
        """The module in the modes of the fit; every walk happens inside."""
        return self.forward.training(() if self.trajectory is None else self.trajectory.eval_modules)

    def start(self, segment: int = 0) -> TrainingState:
        """The captured state before a segment."""
        return self._state(self.segments[segment].start)

    def run(self, weights: Tensor | None = None, renormalize: bool = False) -> TrainingState:
        """The whole fit once more, from its first checkpoint, with other weights of its examples.

        Args:
            weights: [train] float; None: all 1, compared with the captured checkpoints.
            renormalize: a micro-batch is divided by the sum of its weights in place of its size.

        Returns:
            The state after the last step.
        """
        with self.training():
            here = self.start()
            for number, segment in enumerate(self.segments):
                for moment in self.walk(here, segment.steps, weights, renormalize):
                    here = moment.before
                here = self.after
                if weights is None and self.whole:
                    self.compare(number, here)
        return here

    def walk(
        self,
        start: TrainingState,
        steps: Sequence[Step],
        weights: Tensor | None = None,
        renormalize: bool = False,
        separate: bool = False,
    ) -> Iterator[ReplayedStep]:
        """Every step with the state before it, the module standing there; ``after`` is the state after the last.

        Args:
            start: before the first step.
            steps: in their order.
            weights: see ``run``.
            renormalize: see ``run``.
            separate: whether the losses of examples must be told apart although all weights are 1.
        """
        self.after = start
        for step in steps:
            here = self.after
            self._stand(here, step)
            if self.forward.check(step, separate=separate or weights is not None):
                self._stand(here, step)
            gradients, buffers = self.forward.gradients(step, weights, renormalize)
            self.after = here.moved(step, gradients, buffers)
            yield ReplayedStep(step, here, gradients)

    def backwards(self) -> Iterator[ReplayedStep]:
        """Every step from the last to the first, the module standing before it.

        Segments are walked forward from their captured states; one whose states exceed the memory set aside is walked
        a second time in stretches.
        """
        if not self.whole:
            yield from self._reversed(self.start(), self.steps, None)
            return
        for number in reversed(range(len(self.segments))):
            yield from self._reversed(self.start(number), self.segments[number].steps, number)

    def compare(self, segment: int, here: TrainingState) -> None:
        """Measures how far the state after a segment is from the captured one.

        Raises:
            DriftError: further than ``max_drift``.
        """
        found = self.segments[segment]
        end = self._state(found.end)
        moved = end.distance(self._state(found.start))
        away = here.distance(end)
        drift = 0.0 if away == 0.0 else away / moved if moved else float("inf")
        self.drifts[found.end.step] = max(drift, self.drifts.get(found.end.step, 0.0))
        if not drift <= self.max_drift:
            raise DriftError(
                f"Expected the replay to meet the captured weights of step {found.end.step} within "
                f"{self.max_drift:g} of the distance that they moved since step {found.start.step}, got {drift:.2g}. "
                f"{self.cause()} Influence of a run that cannot be repeated is not its derivative: use `TracInCP()`, "
                "fit without what cannot be repeated, or raise `max_drift`."
            )

    def beyond_rounding(self) -> bool:
        """Whether the drift is more than rounding makes of it."""
        like = next(iter(self.engine.task.named_parameters().values()))
        return self.drift > _ROUNDING * torch.finfo(like.dtype).eps

    def cause(self) -> str:
        """What most likely made the replay stray."""
        task, batches = self.engine.task, [batch for step in self.steps for batch in step.batches]
        augmented = any(batch.read for batch in batches)
        if self.examples.draws and not augmented:
            return (
                "The training data draws random numbers (augmentation), in worker processes whose state no fit "
                "captures: with `num_workers=0` it is repeated exactly."
            )
        if augmented and not self.examples.draws:
            return (
                "The fit's examples were read with random numbers (augmentation), those given here are not: pass the "
                "dataset that was trained on."
            )
        if any("cuda" in batch.random for batch in batches) and task.device.type != "cuda":
            return "The fit drew random numbers on a GPU, which a CPU does not repeat."
        precision = str(getattr(getattr(task.trainer, "precision_plugin", None), "precision", ""))
        if "mixed" in precision:
            return f"The fit ran in `precision={precision!r}`, the replay in the weights' own precision."
        others = (
            "something else moved the weights or the gradients (a callback, a hook of the module, another device or "
            "precision), or data that is not what was trained on."
        )
        if self.forward.attention is not None:
            return (
                "Likely causes: the fit's attention ran in a fused kernel, its replay in the math kernel, whose "
                f"gradients of one step differ by {self.forward.attention:.1e} of their length; {others}"
            )
        return f"Likely causes: {others}"

    def _state(self, checkpoint: Checkpoint) -> TrainingState:
        """The captured state; the two last ones are kept, since a segment starts where its neighbour ends."""
        found = self._loaded.pop(checkpoint.step, None)
        while len(self._loaded) > 1:
            del self._loaded[next(iter(self._loaded))]
        self._loaded[checkpoint.step] = (
            TrainingState.of(checkpoint.load(), self.engine.task) if found is None else found
        )
        return self._loaded[checkpoint.step]

    def stand(self, moment: ReplayedStep) -> None:
        """The module before a step of the replay."""
        self._stand(moment.before, moment.step)

    def _stand(self, here: TrainingState, step: Step) -> None:
        """The module before a step: its weights, and the numbers that `training_step` may ask for."""
        here.put_into(self.engine.task)
        set_clock(self.engine.task.module, step.made - 1, step.epoch)

    def _reversed(self, start: TrainingState, steps: Sequence[Step], segment: int | None) -> Iterator[ReplayedStep]:
        fitting = max(1, _HELD // max(1, start.bytes()))
        if len(steps) <= fitting:
            moments = list(self.walk(start, steps))
            if segment is not None:
                self.compare(segment, self.after)
            while moments:
                moment = moments.pop()
                self.stand(moment)
                yield moment
            return
        length = max(fitting, math.isqrt(len(steps)))
        starts = [start]
        for first in range(0, len(steps), length):
            for _ in self.walk(starts[-1], steps[first : first + length]):
                pass
            starts.append(self.after)
        if segment is not None:
            self.compare(segment, starts[-1])
        for number in reversed(range(len(starts) - 1)):
            yield from self._reversed(starts[number], steps[number * length : (number + 1) * length], None)
