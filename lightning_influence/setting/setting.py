"""What a method sees: the training examples of one tile, queries, and the stages of training to look at them."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.gradients import Engine, Gradients
from lightning_influence.gradients.queries import DenseQueries, EachQuery, QueryGradients
from lightning_influence.trajectory import Trajectory
from lightning_influence.types import MissingEvidence

T = TypeVar("T")


@dataclass(frozen=True)
class Queries:
    """Some of the queries, or all of them as one.

    Args:
        engine: takes their gradients (of the loss, or of a measurement).
        examples: the queries' dataset.
        ids: which of them.
        mean: all of them count as one query.
    """

    engine: Engine
    examples: Examples
    ids: range
    mean: bool = False
    _made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return 1 if self.mean else len(self.ids)

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

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gave the first time, for as long as these queries are scored: ``score`` is called once a tile.

        Args:
            key: what it is, with the method and the stage that it belongs to.
            make: makes it.
        """
        return _once(self._made, key, make)


@dataclass(frozen=True)
class Stage:
    """The module at one set of weights, for as long as the loop over stages stands here.

    Args:
        position: of its checkpoint in the trajectory; None where there is no trajectory.
        step: optimizer steps taken before these weights.
        exposure: how strongly each training example of the tile moved the weights since the stage before, in units
            of learning rate: [group, train]. See ``Trajectory.exposure``.
        learning_rates: the learning rate at this stage, [group].
    """

    position: int | None
    step: int
    exposure: Tensor
    learning_rates: Tensor
    _setting: "Setting"

    def gradients(self, queries: Queries) -> QueryGradients:
        """Gradients of the queries at these weights."""
        return queries.gradients()

    def train(self, where: Tensor | None = None) -> Iterator[tuple[slice, Gradients]]:
        """Gradients of the training examples of the tile at these weights, block by block.

        Args:
            where: [train] of the tile; blocks in which it is nowhere true are passed over.

        Yields:
            The block's columns in the tile, and its gradients.
        """
        yield from self._setting.train_blocks(where)


@dataclass
class Setting:
    """The question as one method meets it, one tile of training examples at a time.

    Args:
        engine: gradients of training examples.
        examples: the training dataset.
        ids: training examples of this tile.
        trajectory: what the fit left behind, or None where only the module's present weights are known.
        batches_per_epoch: of the training loader, where it is known.
        models: models trained again on parts of the data (``Attributor(refit=)``), for methods that need REFIT.
        on_block: called after each block with the number of training examples done.
        notes: what a reader of the scores must know; methods add to them.
        figures: numbers that tell how far to trust the scores, by name; methods add to them.
        kept: what a method computes once for all tiles of one question, by a key of its own.
    """

    engine: Engine
    examples: Examples
    ids: range
    trajectory: Trajectory | None
    batches_per_epoch: int | None = None
    models: Any = None
    on_block: Callable[[int], Any] = lambda count: None
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    kept: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def n_train(self) -> int:
        """Training examples of the whole dataset."""
        return len(self.examples)

    def zeros(self, queries: Queries | None = None) -> Tensor:
        """[query, train] of zeros for this tile ([train] without queries), float64 where weights are, else float32."""
        parameters = self.engine.task.named_parameters()
        counting = [parameters[name] for name in self.engine.plan.names] or list(parameters.values())
        like = counting[0]
        dtype = torch.float64 if any(p.dtype is torch.float64 for p in counting) else torch.float32
        shape = (len(self.ids),) if queries is None else (len(queries), len(self.ids))
        return torch.zeros(shape, dtype=dtype, device=like.device)

    def note(self, text: str) -> None:
        """Adds a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def figure(self, name: str, value: Any, keep: Callable[[float, float], float] = max) -> None:
        """Adds a number for `Scores.figures` and the experiment trackers, such as a solver's residual.

        Args:
            name: What it is, in snake_case.
            value: One number.
            keep: Which of two to keep where a number is told again, for another tile or other queries: by default the
                larger, the worse of two residuals. NaN is never forgotten.
        """
        new, old = float(value), self.figures.get(name)
        self.figures[name] = new if old is None or math.isnan(new) else old if math.isnan(old) else keep(old, new)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gave the first time, for all tiles and queries of one question. See ``Queries.once``."""
        return _once(self.kept, key, make)

    def final(self) -> Stage:
        """The module at the weights after the last step."""
        if self.trajectory is None:
            ones = torch.ones(1, len(self.ids), dtype=torch.float64)
            return Stage(None, 0, ones, torch.ones(1, dtype=torch.float64), self)
        return self._stage(len(self.trajectory.checkpoints) - 1)

    def stages(self, checkpoints: Sequence[int] | None = None) -> Iterator[Stage]:
        """The module at each checkpoint that stands for some step, or at those of the given positions.

        Raises:
            MissingEvidence: no trajectory.
            ValueError: a position that does not exist.
        """
        for index in self.positions(checkpoints):
            yield self._stage(index)

    def positions(self, checkpoints: Sequence[int] | None = None) -> list[int]:
        """Which checkpoints ``stages`` visits."""
        return stage_positions(self.trajectory, checkpoints)

    def train_blocks(self, where: Tensor | None = None) -> Iterator[tuple[slice, Gradients]]:
        """See ``Stage.train``."""
        for block in self.examples.blocks(self.ids.start, self.ids.stop):
            columns = slice(block.start - self.ids.start, block.start - self.ids.start + block.size)
            if where is None or bool(where[columns].any()):
                yield columns, self.engine.gradients(block)
            self.on_block(block.size)

    def _stage(self, index: int) -> Stage:
        trajectory = _required(self.trajectory)
        checkpoint = trajectory.checkpoints[index]
        state = checkpoint.load()
        self.engine.task.load(state.parameters, state.buffers, checkpoint.step, checkpoint.epoch)
        exposure = trajectory.exposure(
            index, self.engine.reduction.coefficient(), self.n_train, self.batches_per_epoch
        )[:, self.ids.start : self.ids.stop]
        if not trajectory.has_batch_order:
            self.note("The batch order is not known: every example counts with its expected share of the steps.")
        rates = torch.tensor(trajectory.learning_rates(index), dtype=torch.float64)
        return Stage(index, checkpoint.step, exposure, rates, self)


def stage_positions(trajectory: Trajectory | None, checkpoints: Sequence[int] | None = None) -> list[int]:
    """Checkpoints to look at: the given positions, else all but the initial weights (unless they are all there is)."""
    available = len(_required(trajectory).checkpoints)
    if checkpoints is None:
        first = _required(trajectory).checkpoints[0]
        return list(range(1 if available > 1 and first.step == 0 else 0, available))
    wrong = [c for c in checkpoints if not -available <= c < available]
    if wrong:
        raise ValueError(f"Expected `checkpoints` to be positions among {available} checkpoints, got {wrong!r}.")
    return sorted({c % available for c in checkpoints})


def _required(trajectory: Trajectory | None) -> Trajectory:
    if trajectory is None:
        raise MissingEvidence(
            "Expected a trajectory with checkpoints and learning rates, got `trajectory=None`. Fit with "
            "`Trainer(callbacks=[Influence()])`, or read existing files by `Trajectory.from_checkpoints(paths)`."
        )
    return trajectory


def _once(made: dict[Hashable, Any], key: Hashable, make: Callable[[], T]) -> T:
    if key not in made:
        made[key] = make()
    found: T = made[key]
    return found
