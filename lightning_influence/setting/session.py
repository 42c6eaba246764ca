"""A module and its training data, prepared for questions: final weights, logging off, gradients checked once."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence import timing
from lightning_influence.data.examples import Examples
from lightning_influence.data.source import Source
from lightning_influence.devices import kinds_in_use
from lightning_influence.gradients import Engine, Plan, Reduction
from lightning_influence.gradients.spot_checks import UnequalWeight
from lightning_influence.module.precision import Precision
from lightning_influence.module.quiet import quiet
from lightning_influence.module.task import Loss, Task
from lightning_influence.module.trainer_answers import notes_of
from lightning_influence.module.trainer_reads import FitValues
from lightning_influence.module.trainer_state import detached_trainer
from lightning_influence.setting.batch_index import BatchIndex
from lightning_influence.setting.checkpoints import put_in_place
from lightning_influence.setting.chosen_precision import (
    ChosenPrecision,
    chosen_precision,
    notes_on_precision,
    type_of_half,
)
from lightning_influence.setting.planning import Planner
from lightning_influence.setting.same_data import check_data
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.setting.token_weights import describe
from lightning_influence.setting.unreached import refuse_all_unreached
from lightning_influence.trajectory import Checkpoint, LightningCheckpoint, Trajectory, other_model, other_shapes

# Blocks of training examples are enlarged up to this many examples while their gradients' factors fit in these bytes.
_BLOCK = 2048
_BLOCK_BYTES = 2**24
# The same on an accelerator, which waits for the host between the operations of small blocks; and up to so many times
# the block that is known to fit, since not all that a pass keeps is a factor.
_BLOCK_THERE = 8192
_BLOCK_BYTES_THERE = 2**30
_TIMES_THERE = 16


@dataclass
class Session:
    """Opens questions on one module and training set; the gradients' self-check runs once for all of them.

    Args:
        module: the LightningModule.
        train: its training data.
        trajectory: its last checkpoint is loaded; None: the module's own weights are used.
        trainer: None: a new one with logging off, from the package of the module's base class.
        loss: per-sample losses, or None for ``training_step``.
        names: the parameters whose gradients are used.
        batch_size: examples per block; None: chosen by the size of their gradients.
        own: without a trajectory, loaded in place of the module's own weights; None: they are used.
        datamodule: its batch-transfer hooks are used, or None.
        checks_data: compare data and module with those of the fit, before each question.
        precision: Lightning's word for it, or None.

    Attributes:
        opening_seconds: spent until questions were open, which is on loading, comparing, planning and checking.
    """

    module: Any
    train: Source
    trajectory: Trajectory | None
    trainer: Any
    loss: Loss | None
    names: Sequence[str]
    batch_size: int | None
    own: Checkpoint | None = None
    datamodule: Any = None
    checks_data: bool = True
    precision: str | None = None
    opening_seconds: float = field(init=False, default=0.0)
    _planner: Planner = field(init=False)
    _data_notes: list[str] | None = field(init=False, default=None)
    _asked: Source | None = field(init=False, default=None)
    _chosen: ChosenPrecision | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._planner = Planner(self.train, self.trajectory, self.names)

    @property
    def one_by_one(self) -> list[str]:
        """Parameters whose gradients take a backward pass per example, as far as it was found out."""
        plans = [plan for _, plan in self._planner.found.plans.values()]
        return list(dict.fromkeys(name for plan in plans for name in plan.one_by_one))

    def ending_with(self, own: Checkpoint, trajectory: Trajectory | None) -> "Session":
        """A session with other final weights; what was found about gradients at these weights is found again."""
        return replace(self, own=own, trajectory=trajectory)

    @contextlib.contextmanager
    def quiet(self, asked: bool = False) -> Iterator[Task]:
        """The module at its final weights, in eval mode, with logging off.

        Args:
            asked: a question begins, before which data and module are compared with those of the fit.
        """
        trainer = self.trainer if self.trainer is not None else detached_trainer(self.module)
        fit = fit_values(self.trajectory, self.trainer is not None)
        half, precision = type_of_half(self.module), Precision(self.precision)
        with quiet(self.module, self.loss, trainer, fit=fit, datamodule=self.datamodule, precision=precision) as task:
            before = task.version
            task.numbers = {} if self.trajectory is None else self.trajectory.numbers
            task.weights_changed()  # the stages of a question that is open already must not be used in this one
            last = self.own if self.trajectory is None else self.trajectory.checkpoints[-1]
            if last is not None:
                state = last.load()
                _check_same_model(task, state.parameters, last)
                if (asked or self._data_notes is None) and self.checks_data and self.trajectory is not None:
                    put_in_place(task, last, state)
                    again = self._data_notes is not None  # somebody may have changed either since
                    with task.in_full():
                        notes = check_data(task, self.train, self.trajectory, again)
                    self._data_notes = list(dict.fromkeys([*(self._data_notes or ()), *notes]))
                put_in_place(task, last, state)
            self._chosen = self._chosen or chosen_precision(task, self.examples(self.train), half)
            task.precision = self._chosen.precision
            try:
                yield task
            finally:
                task.weights_returned(before)

    @contextlib.contextmanager
    def open(
        self, queries: Source | None = None, measurement: Loss | None = None, mean: bool = False, gradients: bool = True
    ) -> Iterator[Setting]:
        """The context of a question, whose tile is the whole training set at first.

        Args:
            queries: the queries, or None for self-influence.
            measurement: takes the place of the queries' loss.
            mean: whether the mean over all queries counts as one query.
            gradients: plan and check per-sample gradients. Otherwise a batch's loss is compared with its examples' only
                when a method calls ``Setting.reduction_of``.

        Raises:
            ValueError: a loss that is not made of one loss per example; queries that the module does not accept.
        """
        self._asked, began = queries, timing.clock()
        with self.quiet(asked=True) as task, contextlib.ExitStack() as stack:
            planner, examples = self._planner, self.examples(self.train)
            index = planner.batch_index(task, examples)
            stack.enter_context(task.at(index.first))
            engine = self._engine(task, examples, index) if gradients else Engine(task, Reduction.NONE)
            setting = Setting(
                engine,
                examples,
                range(len(examples)),
                self.trajectory,
                self.train.batches,
                draws=functools.cache(self.train.draws),
                reduction_of=functools.partial(planner.reduction_of, task, examples),
                batch_index=index,
                own_version=task.version,
                refused=planner.found.unreached.error,
            )
            for note in self._notes(task, examples, engine):
                setting.note(note)
            for note in self._data_notes or ():
                setting.warn(note)
            if queries is not None:
                setting.queries = self._queries(task, queries, measurement, mean, gradients, examples)
            if gradients and self.batch_size is None:
                examples.block_size = _block_size(engine.plan, examples.block_size, task.device)
            self.opening_seconds += timing.clock() - began
            try:
                yield setting
            finally:
                for text in notes_of(getattr(self.module, "_trainer", None)):
                    setting.note(text)
            assert self._chosen is not None
            task.notes += notes_on_precision(task, self._chosen, planner.found.compared)
            planner.finished(engine, *([] if setting.queries is None else [setting.queries.engine]))

    def _engine(self, task: Task, examples: Examples, index: BatchIndex) -> Engine:
        """The engine for the training examples, in 16 bits where the module turns out to run in them only."""
        try:
            return self._planner.engine(task, examples, index)
        except Exception:
            tried = self.precision is not None or (self._chosen is not None and self._chosen.failed is not None)
            again = None if tried else chosen_precision(task, examples, torch.bfloat16)
            if again is None or again.failed is None:
                raise
        self._chosen, task.precision = again, again.precision
        return self._planner.engine(task, examples, index)

    def _queries(
        self, task: Task, queries: Source, measurement: Loss | None, mean: bool, gradients: bool, examples: Examples
    ) -> Queries:
        data = self.examples(queries)
        task = task if measurement is None else task.measuring(measurement)
        engine = Engine(task, Reduction.NONE)
        if gradients:
            engine = self._planner.query_engine(task, data, examples)
            refuse_all_unreached(engine, measurement is not None, self._planner.found.unreached.error)
        return Queries(engine, data, range(len(data)), mean, measurement is not None)

    def _notes(self, task: Task, examples: Examples, engine: Engine) -> Iterator[str]:
        """Sentences on what was found out about the module."""
        found = self._planner.found
        kind = next(kinds_in_use(), None)
        if kind is not None and self.trainer is None and task.device.type == "cpu":
            yield (
                f"Computed on the CPU, where the module is, though there is {kind!r}: pass `trainer=`, or the module "
                f"after `module.to({kind!r})`."
            )
        if found.unreached.note is not None:
            yield found.unreached.note
        yield from self._planner.notes_on_values(task, examples)
        if engine.weights is not None:
            yield describe(engine.weights)
        if engine.task.tail.doubt is not None:
            yield (
                f"The loss calls {engine.task.tail.doubt} in float32: scores of examples that the model is certain of "
                "may have lost their digits. Call `.double()` on the module, or pass `loss=`, with "
                "`F.cross_entropy` or the like in Python"
            )
        if found.share_of_copies is not None:
            yield "`training_step` fails on a batch of one: two copies of an example stand for it alone."

    def examples(self, source: Source) -> Examples:
        """The examples of a source, in blocks of ``batch_size``."""
        examples = source.examples(self.batch_size)
        examples.share_of_copies = self._planner.found.share_of_copies
        examples.thorough = self._planner.found.thorough
        return examples

    def knows_more_after(self, error: UnequalWeight) -> bool:
        """Check more examples where a spot check failed; whether there were more to check, or they showed more."""
        with self.quiet() as task:
            if self._planner.checks_more(task, error.of_queries):
                return True
        return any(self._probe_again(ids) for ids in (error.suspects, error.block) if ids)

    def _probe_again(self, block: Sequence[int]) -> bool:
        """Probe the loss once more with some examples of a batch, one of which does not weigh as it does alone.

        Returns:
            Whether the loss is a mean over tokens, of which the examples probed so far had equally many.
        """
        if not self._planner.may_be_of_tokens:
            return False
        with self.quiet() as task:
            for source in (self.train, self._asked):
                if source is None or max(block) >= len(source.dataset):
                    continue
                if self._planner.probe_again(task, self.examples(source), block):
                    return True
        return False


def fit_values(trajectory: Trajectory | None, given: bool) -> FitValues:
    """What a fit recorded of its Trainer.

    Args:
        trajectory: of the fit, if it is known.
        given: whether a question has a Trainer of the user's.
    """
    if trajectory is None:
        return FitValues(given=given)
    exact = frozenset(checkpoint.step for checkpoint in trajectory.checkpoints)
    return FitValues(trajectory.trainer_values, exact, given)


def _block_size(plan: Plan, at_least: int, device: torch.device) -> int:
    """Larger blocks if the factors of an example's gradient are small: fewer, larger matrix products."""
    if plan.bytes_of_one is None:
        return at_least
    each = max(1, plan.bytes_of_one)
    if device.type == "cpu":
        return max(at_least, min(_BLOCK, _BLOCK_BYTES // each))
    return max(at_least, min(_BLOCK_THERE, _TIMES_THERE * at_least, _BLOCK_BYTES_THERE // each))


def _check_same_model(task: Task, saved: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Raises ValueError unless a checkpoint has the module's parameters, in their shapes, and no others."""
    mine = task.named_parameters()
    missing = sorted(mine.keys() - saved.keys())
    strict = getattr(task.module, "strict_loading", True) is not False
    # Lightning's own files, whose buffers are among the parameters, were compared before.
    more = sorted(saved.keys() - mine.keys()) if strict and not isinstance(checkpoint, LightningCheckpoint) else []
    other = other_shapes(mine, {name: value.shape for name, value in saved.items()})
    if missing or other or more:
        found = [f"no {', '.join(f'`{n}`' for n in missing[:5])}"] * bool(missing) + other[:5]
        found += [f"also {', '.join(f'`{n}`' for n in more[:5])}"] * bool(more)
        loose = "; or set `module.strict_loading = False`, if it needs less" if more and not (missing or other) else ""
        raise other_model(checkpoint, task.module, found, loose)
