"""What a method sees of a question: the training examples of one tile, the queries, and the stages of training."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.gradients import Engine, Gradients, Reduction
from lightning_influence.gradients.queries import DenseQueries, EachQuery, QueryGradients
from lightning_influence.module.task import Task
from lightning_influence.trajectory import Trajectory
from lightning_influence.types import MissingEvidence

K = TypeVar("K", bound=Hashable)
S = TypeVar("S")

# Bytes that the gradients of a block of queries may take.
_QUERY_BYTES = 2**29


class TrainedModels(Protocol):
    """Models trained again on parts of the data; ``refit.Models`` is one."""

    @property
    def seeded(self) -> bool:
        """Whether models of one subset differ by their seed."""

    def train(self, membership: Tensor, seeds: Sequence[int]) -> list[str]:
        """Trains what is missing of [model, train] subsets; notes about what failed."""

    def losses(self, membership: Tensor, seeds: Sequence[int], queries: "Queries") -> Tensor:
        """[model, query] float64; NaN for a model that could not be trained."""

    def untrained(self, seeds: Sequence[int], queries: "Queries") -> Tensor:
        """[seed, query] float64 under the models before any training."""


@dataclass(frozen=True)
class Queries:
    """All queries of a question, or some of them: slicing gives the block of those positions.

    Args:
        engine: takes their gradients (of the loss, or of a measurement).
        examples: the queries' dataset.
        ids: which of them.
        mean: all of them count as one query.
        measured: a measurement takes the place of their loss.
    """

    engine: Engine
    examples: Examples
    ids: range
    mean: bool = False
    measured: bool = False

    def __len__(self) -> int:
        return 1 if self.mean else len(self.ids)

    def __getitem__(self, part: slice) -> "Queries":
        ids = self.ids if self.mean else self.ids[part]
        return Queries(self.engine, self.examples, ids, self.mean, self.measured)

    def gradients(self) -> QueryGradients:
        """Their gradients at the module's current weights."""
        blocks = (self.engine.gradients(block) for block in self.examples.blocks(self.ids.start, self.ids.stop))
        if not self.mean:
            return EachQuery(list(blocks))
        total: dict[str, Tensor] = {}
        for block in blocks:
            for name, value in block.total().items():
                total[name] = total[name] + value if name in total else value
        return DenseQueries({name: value[None] / len(self.ids) for name, value in total.items()}, self.engine.groups)

    def at_once(self, most: int | None = None) -> int:
        """How many are held in memory together: whole blocks of the dataset, as many as half a GiB holds.

        Args:
            most: at most this many.
        """
        held, size = 1, self.examples.block_size
        if len(self) > 1:
            some = next(iter(self.examples.blocks(0, min(4, len(self.examples)))))
            each = self.engine.gradients(some).query_bytes(len(self))
            held = _whole_blocks(max(1, _QUERY_BYTES // max(1, each)), size)
        return held if most is None else min(held, _whole_blocks(max(1, most), size))


@dataclass(frozen=True)
class Stage:
    """The module at one set of weights. It answers as long as these weights are in place, and raises afterwards.

    Args:
        position: of its checkpoint in the trajectory; None where there is no trajectory.
        step: optimizer steps taken before these weights.
        exposure: how strongly each training example of the tile moved the weights since the stage before, in units
            of learning rate: [group, train]. See ``Trajectory.exposure``.
        learning_rates: the learning rate at this stage, [group].
        setting: the question.
    """

    position: int | None
    step: int
    exposure: Tensor
    learning_rates: Tensor
    setting: "Setting" = field(repr=False)
    _version: int = field(repr=False)

    def gradients(self, queries: Queries) -> QueryGradients:
        """Gradients of the queries at these weights.

        Raises:
            RuntimeError: other weights were loaded since.
        """
        self._check_loaded()
        return queries.gradients()

    def train(self, where: Tensor | None = None) -> Iterator[tuple[slice, Gradients]]:
        """Gradients of the training examples of the tile at these weights, block by block.

        Args:
            where: [train] of the tile; blocks in which it is nowhere true are skipped.

        Yields:
            The block's columns in the tile, and its gradients.

        Raises:
            RuntimeError: other weights were loaded since.
        """
        setting = self.setting
        for block in setting.examples.blocks(setting.ids.start, setting.ids.stop):
            columns = slice(block.start - setting.ids.start, block.start - setting.ids.start + block.size)
            if where is None or bool(where[columns].any()):
                self._check_loaded()
                yield columns, setting.engine.gradients(block)
            setting.on_block(block.size)

    def _check_loaded(self) -> None:
        if self.setting.task.version != self._version:
            raise RuntimeError(
                f"Expected the stage whose weights are in place, got that of step {self.step}, after which other "
                "weights were loaded. Take the gradients of a stage before going on to the next, or load it again with "
                "`setting.stages(...)` or `setting.final()`."
            )


@dataclass
class Setting:
    """One question as a method meets it, one tile of training examples at a time.

    Args:
        engine: gradients of training examples.
        examples: the training dataset.
        ids: training examples of this tile.
        trajectory: what the fit left behind, or None where only the module's present weights are known.
        batches_per_epoch: of the training loader, where it is known.
        queries: all queries, where there are any.
        models: models trained again on parts of the data (``Attributor(refit=)``), for methods that need REFIT.
        reduction_of: how the loss of a batch relates to those of its examples, on the training side (None) or of the
            queries. ``engine`` knows it too, except for a method that takes no gradients.
        on_block: called after each block with the number of training examples done.
        notes: what a reader of the scores must know; methods add to them.
        diagnostics: numbers that say how far to trust the scores, by name; methods add to them.
    """

    engine: Engine
    examples: Examples
    ids: range
    trajectory: Trajectory | None
    batches_per_epoch: int | None = None
    queries: Queries | None = None
    models: TrainedModels | None = None
    reduction_of: Callable[[Queries | None], Reduction] = lambda queries: Reduction.NONE
    on_block: Callable[[int], Any] = lambda count: None
    notes: list[str] = field(default_factory=list)
    diagnostics: dict[str, float] = field(default_factory=dict)
    _states: dict[tuple[type, Hashable], Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The module: quiet, in eval mode."""
        return self.engine.task

    @property
    def n_train(self) -> int:
        """Training examples of the whole dataset."""
        return len(self.examples)

    def zeros(self, queries: Queries | None = None) -> Tensor:
        """[query, train] of zeros for this tile ([train] without queries), float64 where weights are, else float32."""
        parameters = self.task.named_parameters()
        counting = [parameters[name] for name in self.engine.plan.names] or list(parameters.values())
        dtype = torch.float64 if any(p.dtype is torch.float64 for p in counting) else torch.float32
        shape = (len(self.ids),) if queries is None else (len(queries), len(self.ids))
        return torch.zeros(shape, dtype=dtype, device=counting[0].device)

    def note(self, text: str) -> None:
        """Adds a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def diagnostic(self, name: str, value: Any, keep: Callable[[float, float], float] = max) -> None:
        """Adds a number to `Scores.diagnostics`, which experiment trackers show too, such as a solver's residual.

        Args:
            name: What it is, in snake_case.
            value: One number.
            keep: Which of two to keep where a number is reported again, for another tile or other queries: by default
                the larger, the worse of two residuals. NaN is always kept.
        """
        new, old = float(value), self.diagnostics.get(name)
        self.diagnostics[name] = new if old is None or math.isnan(new) else old if math.isnan(old) else keep(old, new)

    def state(self, owner: Hashable, kind: type[S], *arguments: Any) -> S:
        """What a method or curvature keeps from one tile and block of queries to the next, while a question lasts.

        Args:
            owner: the method or curvature.
            kind: a class whose fields say what is kept, made with ``arguments`` at the first call.
            arguments: for it.
        """
        return cached(self._states, (kind, owner), lambda: kind(*arguments))

    def final(self) -> Stage:
        """The module at the weights after the last step."""
        if self.trajectory is None:
            ones = torch.ones(1, len(self.ids), dtype=torch.float64)
            return Stage(None, 0, ones, torch.ones(1, dtype=torch.float64), self, self.task.version)
        return self._stage(len(self.trajectory.checkpoints) - 1)

    def stages(self, checkpoints: Sequence[int] | None = None) -> Iterator[Stage]:
        """The module at each checkpoint that represents some steps, or at those of the given positions.

        Raises:
            MissingEvidence: no trajectory.
            ValueError: a position that does not exist.
        """
        for index in stage_positions(self.trajectory, checkpoints):
            yield self._stage(index)

    def _stage(self, index: int) -> Stage:
        trajectory = _required(self.trajectory)
        checkpoint = trajectory.checkpoints[index]
        state = checkpoint.load()
        self.task.load(state.parameters, state.buffers, checkpoint.step, checkpoint.epoch)
        exposure = trajectory.exposure(
            index, self.engine.reduction.coefficient(), self.n_train, self.batches_per_epoch
        )[:, self.ids.start : self.ids.stop]
        if not trajectory.has_batch_order:
            self.note("The batch order is not known: every example counts with its expected share of the steps.")
        rates = torch.tensor(trajectory.learning_rates(index), dtype=torch.float64)
        return Stage(index, checkpoint.step, exposure, rates, self, self.task.version)


def stage_positions(trajectory: Trajectory | None, checkpoints: Sequence[int] | None = None) -> list[int]:
    """Checkpoints to visit: the given positions, else all but the initial weights (unless they are all there is)."""
    available = len(_required(trajectory).checkpoints)
    if checkpoints is None:
        first = _required(trajectory).checkpoints[0]
        return list(range(1 if available > 1 and first.step == 0 else 0, available))
    wrong = [c for c in checkpoints if not -available <= c < available]
    if wrong:
        raise ValueError(f"Expected `checkpoints` to be positions among {available} checkpoints, got {wrong!r}.")
    return sorted({c % available for c in checkpoints})


def cached(cache: dict[K, Any], key: K, make: Callable[[], S]) -> S:
    """The cache's value for the key, made and kept where there is none."""
    if key not in cache:
        cache[key] = make()
    found: S = cache[key]
    return found


def _required(trajectory: Trajectory | None) -> Trajectory:
    if trajectory is None:
        raise MissingEvidence(
            "Expected a trajectory with checkpoints and learning rates, got `trajectory=None`. Fit with "
            "`Trainer(callbacks=[Influence()])`, or read existing files by `Trajectory.from_checkpoints(paths)`."
        )
    return trajectory


def _whole_blocks(count: int, size: int) -> int:
    """At most ``count`` examples that are whole blocks of ``size``, where one fits."""
    return count // size * size if count >= size else count
