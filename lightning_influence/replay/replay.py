"""Replays a captured fit step by step, and measures its distance from the captured checkpoints."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.devices import read_numbers
from lightning_influence.gradients import Engine
from lightning_influence.module.buffer_paths import candidates, read_by
from lightning_influence.module.precision import precision_of
from lightning_influence.module.trainer_state import set_clock
from lightning_influence.replay.forward import Forward
from lightning_influence.replay.steps import Segment, Step, segments_of
from lightning_influence.replay.training_state import TrainingState
from lightning_influence.trajectory import Checkpoint, Trajectory
from lightning_influence.trajectory.files import ACCELERATOR

MAX_DRIFT = 0.1
"""The largest distance from a checkpoint, relative to the distance that the weights moved since the one before."""
# Drift of more units in the last place than this is more than rounding.
_ROUNDING = 1e4
# Bytes of states that may be kept at once on a walk backwards.
_HELD = 2**29


class DriftError(RuntimeError):
    """The replayed weights differ from those of the fit."""


@dataclass(frozen=True)
class ReplayedStep:
    """One step of the replay.

    Args:
        step: the captured step.
        before: the state of training before it.
        gradients: before clipping, by parameter name; absent where the loss does not depend on the parameter.
    """

    step: Step
    before: TrainingState
    gradients: dict[str, Tensor]


@dataclass
class Replay:
    """A captured fit that can be replayed.

    Args:
        engine: holds the plan of the self-check, which must have all parameters that trained.
        examples: the training dataset.
        trajectory: what the fit recorded.
        max_drift: see ``MAX_DRIFT``.

    Raises:
        MissingEvidence: the fit was not captured step by step.
        ValueError: an optimizer or options of it that have no rule; a plan without some parameters that trained.
    """

    engine: Engine
    examples: Examples
    trajectory: Trajectory | None
    max_drift: float = MAX_DRIFT
    segments: list[Segment] = field(init=False)
    _loaded: dict[int, TrainingState] = field(init=False, default_factory=dict)
    _reached: dict[int, frozenset[str]] = field(init=False, default_factory=dict)
    whole: bool = field(init=False, default=True)
    """Whether all examples take part, so that the states are those at the captured checkpoints."""
    drifts: dict[int, float] = field(init=False, default_factory=dict)
    """By step of each checkpoint: distance from it, relative to the distance moved since the one before."""

    def __post_init__(self) -> None:
        self.segments = segments_of(self.trajectory)
        self.forward = Forward(self.engine, self.examples)
        self.trained = sorted({name for step in self.steps for name in step.moves.options})
        self.engine.plan.check_has(self.trained)
        self.engine.width(self.examples)  # measured now, while the module is in eval mode

    @property
    def drift(self) -> float:
        """The largest of ``drifts``."""
        return max(self.drifts.values(), default=0.0)

    @property
    def steps(self) -> list[Step]:
        """All steps in their order."""
        return [step for segment in self.segments for step in segment.steps]

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Puts the module into the modes of the fit; every walk happens inside."""
        return self.forward.training(() if self.trajectory is None else self.trajectory.eval_modules)

    def start(self, segment: int = 0) -> TrainingState:
        """The captured state at the start of a segment."""
        return self._state(self.segments[segment].start)

    def end(self) -> TrainingState:
        """The captured state at the end of the fit."""
        return self._state(self.segments[-1].end)

    def run(self, weights: Tensor | None = None, renormalize: bool = False) -> TrainingState:
        """Replays the whole fit from its first checkpoint, with weights of its examples.

        Args:
            weights: [train] float; None: all 1, and the states are compared with the captured checkpoints.
            renormalize: divide a micro-batch's loss by the sum of its weights in place of its size.

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
        """Yields every step with the state before it loaded; in the end ``after`` is the state after the last.

        Args:
            start: the state before the first step.
            steps: in their order.
            weights: see ``run``.
            renormalize: see ``run``.
            separate: whether the losses of single examples are needed although all weights are 1.
        """
        self.after = start
        for step in steps:
            here = self.after
            self.load(here, step)
            if self.forward.check(step, separate=separate or weights is not None):
                self.load(here, step)
            gradients, buffers = self.forward.gradients(step, weights, renormalize)
            gradients = self._moved(step, gradients, weights is None and self.whole)
            self.after = here.moved(step, gradients, buffers)
            yield ReplayedStep(step, here, gradients)

    @property
    def steps_alike(self) -> bool:
        """Whether every step has gradients for all parameters that any step's loss reaches."""
        if any(step.made not in self._reached for step in self.steps):
            self.run()
        unreached = self.engine.plan.unreached
        return all(self._reached[s.made] == s.moves.options.keys() - set(unreached) for s in self.steps)

    def _moved(self, step: Step, gradients: dict[str, Tensor], plain: bool) -> dict[str, Tensor]:
        """The gradients of the parameters that the step moves, which is known once it was replayed as it was.

        A path that computes examples one by one gives zeros where autograd gives no gradient.
        """
        if plain:
            self._reached[step.made] = frozenset(gradients)
        reached = self._reached.get(step.made)
        return gradients if reached is None else {name: g for name, g in gradients.items() if name in reached}

    def backwards(self) -> Iterator[ReplayedStep]:
        """Yields every step from the last to the first, with the state before it loaded.

        Each segment is walked forward from its captured state; where its states do not fit into memory together, it is
        walked a second time, in parts.
        """
        if not self.whole:
            yield from self._reversed(self.start(), self.steps, None)
            return
        for number in reversed(range(len(self.segments))):
            yield from self._reversed(self.start(number), self.segments[number].steps, number)

    def compare(self, segment: int, here: TrainingState) -> None:
        """Records the drift at the end of a segment.

        Args:
            segment: its number.
            here: the replayed state at its end.

        Raises:
            DriftError: it is more than ``max_drift``.
        """
        found = self.segments[segment]
        end = self._state(found.end)
        (moved,), (missed,) = read_numbers([end.distance(self._state(found.start)), here.distance(end)])
        drift = 0.0 if missed == 0.0 else missed / moved if moved else float("inf")
        self.drifts[found.end.step] = max(drift, self.drifts.get(found.end.step, 0.0))
        if not drift <= self.max_drift:
            raise DriftError(
                f"Expected training steps that are repeated from the record to end at the fit's weights of step "
                f"{found.end.step}, within {self.max_drift:g} of the distance that those moved since step "
                f"{found.start.step}, got {drift:.2g}. {self.cause()} Scores would not be about this fit: fit again "
                "without what cannot be repeated, or raise `max_drift`. `TracInCP()` repeats no step, but it is right "
                "only if data and loss are those of the fit."
            )
        if self.beyond_rounding() and (name := self._still(found, here)) is not None:
            raise DriftError(
                f"Expected the loss to move the buffers that it reads as the fit did, got `{name}`, which only the fit "
                f"moved (repeated steps miss its weights by {drift:.2g}). Move it in `training_step`, and leave "
                "`loss=` out or move it there too; or use `TracInCP()`, which repeats no step."
            )

    def beyond_rounding(self) -> bool:
        """Whether the drift is more than rounding."""
        like = next(iter(self.engine.task.named_parameters().values()))
        return self.drift > _ROUNDING * torch.finfo(like.dtype).eps

    def cause(self) -> str:
        """A sentence that names the most likely cause of the drift."""
        task, batches = self.engine.task, [batch for step in self.steps for batch in step.batches]
        augmented = any(batch.read for batch in batches)
        if self.examples.draws and not augmented:
            return (
                "The training data draws random numbers (augmentation), in worker processes, whose random state is not "
                "captured: with `num_workers=0` it is repeated exactly."
            )
        if augmented and not self.examples.draws:
            return (
                "The fit's examples were read with random numbers (augmentation), those given here are not: pass the "
                "dataset that was trained on."
            )
        drew = {_drawn_on(batch.random) for batch in batches if batch.random}
        if drew and task.device.type not in drew:
            return f"The fit drew random numbers on {drew.pop()}, which cannot be repeated on {task.device.type}."
        precision = precision_of(task.trainer)
        if "mixed" in (precision or ""):
            return f"The fit ran in `precision={precision!r}`, the replay in the weights' own precision."
        others = (
            "something else changed the weights or the gradients (a callback, a hook of the module, another device or "
            "precision), or the data are not those that were trained on."
        )
        if self.forward.attention is not None:
            return (
                "Likely causes: the fit's attention ran in a fused kernel, its replay in the math kernel, whose "
                f"gradients of one step differ by {self.forward.attention:.1e} of their length; {others}"
            )
        return f"Likely causes: {others}"

    def _still(self, segment: Segment, here: TrainingState) -> str | None:
        """A buffer that the loss reads and that the fit moved in a segment, but its replay did not; None: none is."""
        start, end = self._state(segment.start).buffers, self._state(segment.end).buffers
        names = [
            name
            for name in candidates(self.engine.task)
            if name in start
            and torch.equal(here.buffers[name], start[name])
            and not torch.equal(end[name], start[name])
        ]
        batch = segment.steps[-1].batches[0] if segment.steps else None
        if batch is None or not names:
            return None
        data = self.forward.read(batch)
        return next((n for n in names if read_by(self.engine.task, n, lambda: self.forward.losses(batch, data))), None)

    def _state(self, checkpoint: Checkpoint) -> TrainingState:
        """The captured state at a checkpoint; the last two are kept, since a segment starts where another ends."""
        found = self._loaded.pop(checkpoint.step, None)
        while len(self._loaded) > 1:
            del self._loaded[next(iter(self._loaded))]
        self._loaded[checkpoint.step] = (
            TrainingState.of(checkpoint.load(), self.engine.task) if found is None else found
        )
        return self._loaded[checkpoint.step]

    def load(self, here: TrainingState, step: Step) -> None:
        """Loads the state, and the numbers of step and epoch that ``training_step`` may read."""
        here.put_into(self.engine.task)
        set_clock(self.engine.task.module, step.made - 1, step.epoch)

    def _reversed(self, start: TrainingState, steps: Sequence[Step], segment: int | None) -> Iterator[ReplayedStep]:
        most = max(1, _HELD // max(1, start.bytes()))
        if len(steps) <= most:
            moments = list(self.walk(start, steps))
            if segment is not None:
                self.compare(segment, self.after)
            while moments:
                moment = moments.pop()
                self.load(moment.before, moment.step)
                yield moment
            return
        length = max(most, math.isqrt(len(steps)))
        starts = [start]
        for first in range(0, len(steps), length):
            for _ in self.walk(starts[-1], steps[first : first + length]):
                pass
            starts.append(self.after)
        if segment is not None:
            self.compare(segment, starts[-1])
        for number in reversed(range(len(starts) - 1)):
            yield from self._reversed(starts[number], steps[number * length : (number + 1) * length], None)


def _drawn_on(states: Mapping[str, bytes]) -> str:
    """The type of the device whose generator a forward pass drew from."""
    return states[ACCELERATOR].partition(b":")[0].decode() if ACCELERATOR in states else "cpu"
