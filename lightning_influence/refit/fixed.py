"""Models of the captured run replayed with other weights of its examples, many at once."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.progress import telling
from lightning_influence.refit.pool import Failure, Job
from lightning_influence.refit.store import TrainedModel, digest_of
from lightning_influence.replay.replay import Replay
from lightning_influence.replay.samples import seconds_of_walk
from lightning_influence.replay.vectorized import run_many
from lightning_influence.setting.session import Session
from lightning_influence.trajectory import Trajectory
from lightning_influence.types import bytes_in

# Finished models are written to disk about this often, in seconds.
_SECONDS = 10.0
# Models that are timed for an estimate.
_TIMED = 16
# At most this many models, and bytes of them, are trained in one call.
_MODELS, _BYTES = 1024, 2**28


@dataclass
class Fixed:
    """Trains by replaying the captured run with the weight of what is left out set to 0.

    Args:
        session: opens the module that was trained, with its data.
        trajectory: the captured run.
        removal: whether the divisor of a batch's loss stays, or is what remains of the batch.
    """

    session: Session
    trajectory: Trajectory
    removal: Literal["downweight", "renormalize"] = "downweight"
    seeded: bool = False
    _seconds: float = 0.0  # of one replay of the run as it was
    _each: float = 0.0  # per model, in the last call

    def identity(self) -> dict[str, Any]:
        """Hash of the captured run: its first and last weights, batches and learning rates."""
        steps = [self.trajectory.steps["ids"].to_pylist(), self.trajectory.steps["lr"].to_pylist()]
        end = self.trajectory.checkpoints[-1].load().parameters
        run = digest_of(self.initial(0), end=digest_of(end), steps=steps)
        return {"seeds": "fixed", "removal": self.removal, "run": run}

    def initial(self, seed: int) -> dict[str, Tensor]:
        """The initial weights of the run, whatever the seed."""
        state = self.trajectory.checkpoints[0].load()
        return {**state.parameters, **state.buffers}

    def train_all(
        self, jobs: Sequence[Job], take: Callable[[Sequence[TrainedModel]], None], done: Callable[[int], Any]
    ) -> list[Failure]:
        """Trains models side by side, passes those of each call to ``take``, and returns the jobs that failed.

        Raises:
            MissingEvidence: the fit was not captured step by step.
            DriftError: its replay does not reproduce the captured weights.
        """
        with self._replay() as replay:
            failures: list[Failure] = []
            first = 0
            while first < len(jobs):
                part = jobs[first : first + self._count()]
                start = time.perf_counter()
                weights = torch.stack([membership for membership, _ in part]).double()
                found = run_many(replay, weights, self.removal == "renormalize", done)
                self._each = each = (time.perf_counter() - start) / len(part)
                models = [
                    TrainedModel(membership, seed, each, {name: value[row].cpu() for name, value in found.items()})
                    for row, (membership, seed) in enumerate(part)
                ]
                take([model for model in models if not model.broken])
                failures += [
                    Failure(job, f"ValueError: NaN or infinity in `{model.broken}` after training.")
                    for job, model in zip(part, models, strict=True)
                    if model.broken
                ]
                first += len(part)
        return failures

    def seconds(self, jobs: Sequence[Job]) -> float:
        """Estimate the seconds of training models, by a few steps of some side by side; and of one replay as it was."""
        some = torch.stack([membership for membership, _ in jobs[:_TIMED]]).double()
        renormalize = self.removal == "renormalize"
        with self.session.open() as setting:
            replay = Replay(setting.engine, setting.examples, self.trajectory)
            plain = seconds_of_walk(replay, lambda few: few.run())
            each = seconds_of_walk(replay, lambda few: run_many(few, some, renormalize)) / len(some)
        return plain + each * len(jobs)

    def _count(self) -> int:
        """How many models to train in one call, after which they are written."""
        # Side by side, a model takes far less time than the run alone; where they are trained in turn, as much.
        each = self._each or self._seconds / 4
        size = bytes_in(self.initial(0))
        return max(1, min(_MODELS, int(_SECONDS / each), _BYTES // max(1, size)))

    @contextlib.contextmanager
    def _replay(self) -> Iterator[Replay]:
        with self.session.open() as setting:
            replay = Replay(setting.engine, setting.examples, self.trajectory)
            if self._seconds == 0:
                start = time.perf_counter()
                with telling(self.session.trainer, "retraining: repeating the fit as it was, to compare its weights"):
                    replay.run()  # unchanged: raises unless it ends at the captured weights
                self._seconds = time.perf_counter() - start
            yield replay
