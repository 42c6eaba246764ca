"""What a method works with: the training examples of one tile, the queries, and the module at its checkpoints."""

import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_influence import timing
from lightning_influence.data.examples import Examples
from lightning_influence.gradients import Engine, Gradients, Reduction
from lightning_influence.gradients.queries import DenseQueries, EachQuery, QueryGradients, own_gradients
from lightning_influence.module.task import Task
from lightning_influence.processes import Processes
from lightning_influence.progress import Progress, no_progress
from lightning_influence.setting.batch_index import BatchIndex
from lightning_influence.setting.checkpoints import put_in_place, required, stage_positions
from lightning_influence.setting.exposure import exposure_before
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.exposure import ExpectedDraws

if TYPE_CHECKING:
    from lightning_influence.setting.trained_models import TrainedModels

K = TypeVar("K", bound=Hashable)
S = TypeVar("S")

# Memory for the gradients of a block of queries, or for what is kept of those of training examples, in bytes.
GRADIENT_BYTES = 2**29


@dataclass(frozen=True)
class Queries:
    """All queries of a question, or some of them. Slicing selects a block of them by position.

    Args:
        engine: computes gradients of their loss or measurement.
        examples: the queries' dataset.
        ids: the ids of the selected queries in it.
        mean: whether the mean over all queries counts as one query.
        measured: whether a measurement takes the place of their loss.
    """

    engine: Engine
    examples: Examples
    ids: range
    mean: bool = False
    measured: bool = False

    def __len__(self) -> int:
        return 1 if self.mean else len(self.ids)

    def __getitem__(self, part: slice) -> "Queries":
        return self if self.mean else replace(self, ids=self.ids[part])

    def gradients(self) -> QueryGradients:
        """Gradients of the queries at the weights that are loaded now."""
        read, again = self.examples.blocks(self.ids.start, self.ids.stop), self.examples.chosen
        blocks = (own_gradients(self.engine, block, again) for block in read)
        if not self.mean:
            each = EachQuery(list(blocks))
            self.engine.read_checks()
            return each
        total: dict[str, Tensor] = {}
        for block in blocks:
            for name, value in block.total().items():
                total[name] = total[name] + value if name in total else value
        self.engine.read_checks()
        return DenseQueries({name: value[None] / len(self.ids) for name, value in total.items()}, self.engine.groups)

    def at_once(self, most: int | None = None) -> int:
        """How many queries to have in memory at once: whole blocks of the dataset, in up to half a GiB.

        Args:
            most: no more than this many; None: limited by memory alone.
        """
        held, size = 1, self.examples.block_size
        if len(self) > 1:
            some = next(self.examples.blocks(0, min(4, len(self.examples))))
            each = self.engine.gradients(some, checked=False).query_bytes(len(self))
            held = whole_blocks(max(1, GRADIENT_BYTES // max(1, each)), size)
        return held if most is None else min(held, whole_blocks(max(1, most), size))


@dataclass(frozen=True, eq=False)
class Stage:
    """The module with the weights of one checkpoint. Once other weights are loaded, its methods raise.

    Args:
        position: of the checkpoint in the trajectory; None without a trajectory.
        step: number of optimizer steps before the checkpoint.
        exposure: the sum of effective learning rates with which each training example of the tile entered the steps
            since the checkpoint before, [group, train]; see ``Trajectory.exposure``.
        learning_rates: at the checkpoint, [group].
        setting: the question.
        by_index: whether the loss depends on the index of a batch, so that an example counts by its visits.
    """

    position: int | None
    step: int
    exposure: Tensor
    learning_rates: Tensor
    setting: "Setting" = field(repr=False)
    _ids: range = field(repr=False)
    _version: int = field(repr=False)
    by_index: bool = False

    def gradients(self, queries: Queries) -> QueryGradients:
        """Gradients of the queries at these weights.

        Raises:
            RuntimeError: other weights are loaded now.
        """
        self.check_loaded()
        return queries.gradients()

    def train(self, where: Tensor | None = None) -> Iterator[tuple[slice, Gradients]]:
        """Gradients of the training examples of the tile at these weights, block by block.

        Args:
            where: [train] bool, for the tile; blocks without any True are skipped.

        Yields:
            The block's columns in the tile, and its gradients.

        Raises:
            RuntimeError: other weights are loaded now, or the stage was made for another tile.
            ValueError: the loss in eval mode does not depend on a parameter that trained.
        """
        setting = self.setting
        if setting.refused is not None:
            raise ValueError(setting.refused)
        if setting.ids != self._ids:
            raise RuntimeError(
                f"Expected a stage of the training examples {setting.ids!r}, got one of {self._ids!r}. Load the stage "
                "again for each tile with `setting.stages(...)` or `setting.final()`."
            )
        for block in setting.examples.blocks(setting.ids.start, setting.ids.stop):
            columns = slice(block.start - setting.ids.start, block.start - setting.ids.start + block.size)
            if where is None or bool(where[columns].any()):
                self.check_loaded()
                yield columns, setting.engine.gradients(block, again=setting.examples.chosen)
            setting.on_block(block.size)
        setting.engine.read_checks()

    def check_loaded(self) -> None:
        """Raise unless the stage's weights are loaded.

        Raises:
            RuntimeError: other weights are loaded now.
        """
        if self.setting.task.version != self._version:
            again = ", or load it again with `setting.stages(...)` or `setting.final()`"
            raise RuntimeError(
                f"Expected the weights of the stage at step {self.step} to be loaded, got others, which were loaded "
                "after them. Compute a stage's gradients before other weights are loaded"
                f"{'' if self.position is None else again}."
            )


@dataclass
class Setting:
    """The context of one question: module, training examples, trajectory and queries, and the tile to be scored.

    Args:
        engine: computes gradients of training examples.
        examples: the training dataset.
        ids: ids of the training examples in the current tile.
        trajectory: the checkpoints and batch order of the fit; None: only the module's present weights are known.
        batches_per_epoch: length of the training DataLoader, if known.
        draws: returns how often the training loader is expected to draw each example; None: equally often.
        processes: that answer the question together, each with a part of the training examples or queries.
        queries: all queries; None for self-influence.
        models: models retrained on parts of the data (``Attributor(refit=)``), for methods with ``Evidence.REFIT``.
        reduction_of: returns how the loss of a batch follows from the losses of its examples (mean, sum, none), for the
            queries, or with None for training examples. ``engine.reduction`` has it too, unless the method takes no
            gradients.
        on_block: called after each block with the number of training examples in it.
        progress: shows that of other work, such as preparing a curvature; see ``lightning_influence.progress``.
        deadline: when solvers stop with what they have found, by ``timing.clock``; None: when they are done.
        notes: sentences that are saved with the scores; see ``note``.
        diagnostics: numbers that are saved with the scores; see ``diagnostic``.
        refused: why gradients of training examples in eval mode are no answer; None if they are.
        batch_index: whether the loss depends on the index of a batch.
        own_version: version of the weights that were in place when the question was opened; see ``Task.version``.
    """

    engine: Engine
    examples: Examples
    ids: range
    trajectory: Trajectory | None
    batches_per_epoch: int | None = None
    draws: Callable[[], ExpectedDraws | None] = lambda: None
    processes: Processes = field(default_factory=Processes)
    queries: Queries | None = None
    models: "TrainedModels | None" = None
    reduction_of: Callable[[Queries | None], Reduction] = lambda queries: Reduction.NONE
    on_block: Callable[[int], Any] = lambda count: None
    progress: Progress = no_progress
    notes: list[str] = field(default_factory=list)
    diagnostics: dict[str, float] = field(default_factory=dict)
    _states: dict[tuple[Callable[..., Any], Hashable], Any] = field(default_factory=dict)
    refused: str | None = None
    batch_index: BatchIndex = field(default_factory=BatchIndex)
    own_version: int = 0
    deadline: float | None = None

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and timing.clock() > self.deadline

    @property
    def task(self) -> Task:
        """The module as a function of weights and a batch; in eval mode, with logging off."""
        return self.engine.task

    @property
    def n_train(self) -> int:
        """The number of training examples in the whole dataset."""
        return len(self.examples)

    def zeros(self, queries: Queries | None = None) -> Tensor:
        """Zeros for the scores of this tile, [query, train], or [train] without queries.

        In float64 if any of the parameters is, otherwise in float32.
        """
        parameters = self.task.named_parameters()
        counting = [parameters[name] for name in self.engine.plan.names] or list(parameters.values())
        dtype = torch.float64 if any(p.dtype is torch.float64 for p in counting) else torch.float32
        shape = (len(self.ids),) if queries is None else (len(queries), len(self.ids))
        return torch.zeros(shape, dtype=dtype, device=counting[0].device)

    def note(self, text: str) -> None:
        """Add a sentence that a reader of the scores should know; repeated ones are stored once."""
        if text not in self.notes:
            self.notes.append(text)

    def diagnostic(self, name: str, value: Any, keep: Callable[[float, float], float] = max) -> None:
        """Add a number that tells how far to trust the scores, such as a solver's residual.

        Args:
            name: what it is, in snake_case.
            value: one number.
            keep: combines two values of the same name, from several tiles or blocks of queries; by default the larger,
                which is the worse of two residuals. NaN is always kept.
        """
        new, old = float(value), self.diagnostics.get(name)
        self.diagnostics[name] = new if old is None or math.isnan(new) else old if math.isnan(old) else keep(old, new)

    def warn(self, text: str) -> None:
        """Warn now, and add a note to the scores; once, however often it is called with the same text."""
        if text not in self.notes:
            warnings.warn(text, UserWarning, stacklevel=2)
        self.note(text)

    def state(self, owner: Hashable, kind: Callable[..., S], *arguments: Any) -> S:
        """An object in which a method or curvature keeps what it computed, for later tiles and blocks of queries.

        It lasts as long as the question. Later calls with the same owner and kind return the same object.

        Args:
            owner: the method or curvature.
            kind: the object's class, whose fields document what is kept, or a function that makes the object.
            arguments: for the class or function, at the first call.
        """
        return cached(self._states, (kind, owner), lambda: kind(*arguments))

    def final(self) -> Stage:
        """Load the last checkpoint; without a trajectory, the module as it is."""
        if self.trajectory is None:
            ones = torch.ones(1, len(self.ids), dtype=torch.float64)
            # Once other weights were loaded, there is no way back to the module's own within the question.
            return Stage(None, 0, ones, torch.ones(1, dtype=torch.float64), self, self.ids, self.own_version)
        return self._stage(len(self.trajectory.checkpoints) - 1)

    def stages(self, checkpoints: Sequence[int] | None = None) -> Iterator[Stage]:
        """Load one checkpoint after another; yields the module with its weights.

        Args:
            checkpoints: positions in the trajectory; None: all but the initial weights.

        Raises:
            MissingEvidence: no trajectory.
            ValueError: a position that does not exist.
        """
        for index in stage_positions(self.trajectory, checkpoints):
            yield self._stage(index)

    def load(self, index: int) -> int:
        """Load the weights of the checkpoint at a position in the trajectory; its step."""
        checkpoint = required(self.trajectory).checkpoints[index]
        put_in_place(self.task, checkpoint)
        return checkpoint.step

    def _stage(self, index: int) -> Stage:
        trajectory, step = required(self.trajectory), self.load(index)
        by_index = self.depends_on_index(index)
        exposure = exposure_before(self, index)[:, self.ids.start : self.ids.stop]
        rates = torch.tensor(trajectory.learning_rates(index), dtype=torch.float64)
        return Stage(index, step, exposure, rates, self, self.ids, self.task.version, by_index)

    def depends_on_index(self, position: int | None) -> bool:
        """Whether the loss depends on the index of a batch at these weights, which is noted; see ``BatchIndex``."""
        pair = self.batch_index.differing(position)
        if pair is not None and not any(note.startswith("The loss depends on `batch_idx`") for note in self.notes):
            self.note(
                self.batch_index.note(pair, self.queries is not None, bool(self.queries and self.queries.measured))
            )
        return pair is not None


def cached(cache: dict[K, Any], key: K, make: Callable[[], S]) -> S:
    """The value of the key; if there is none yet, it is made and stored."""
    if key not in cache:
        cache[key] = make()
    found: S = cache[key]
    return found


def whole_blocks(count: int, size: int) -> int:
    """``count`` rounded down to whole blocks of ``size``; a count below one block is returned as it is."""
    return count // size * size if count >= size else count
