"""A module and its training data, prepared for questions: final weights, logging off, gradients checked once."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.data.source import Source
from lightning_influence.gradients import Engine, Plan, Reduction, make_plan, probe_examples
from lightning_influence.module.quiet import quiet
from lightning_influence.module.task import Loss, Task
from lightning_influence.module.trainer_answers import notes_of
from lightning_influence.module.trainer_reads import FitValues
from lightning_influence.module.trainer_state import detached_trainer
from lightning_influence.setting.same_data import check_data
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.trajectory import Checkpoint, LightningCheckpoint, Trajectory

# Blocks of training examples are enlarged up to this many examples while their gradients' factors fit in these bytes.
_BLOCK = 2048
_BLOCK_BYTES = 2**24


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
        checks_data: compare data and module with those of the fit, before the first question.
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
    _data_notes: list[str] | None = None
    _found: dict[tuple[Any, ...], tuple[Reduction, Plan]] = field(default_factory=dict)
    _checked: dict[tuple[Any, ...], Reduction] = field(default_factory=dict)
    _in_use: list[Any] = field(default_factory=list)
    _large_block: int | None = None
    _reduction: Reduction | None = None
    _share_of_copies: float | None = None

    def ending_with(self, own: Checkpoint, trajectory: Trajectory | None) -> "Session":
        """A session with other final weights; what was found about gradients at these weights is found again."""
        fresh: dict[str, Any] = {
            part.name: part.default if part.default_factory is MISSING else part.default_factory()
            for part in fields(self)
            if part.name.startswith("_")
        }
        return replace(self, own=own, trajectory=trajectory, **fresh)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[Task]:
        """The module at its final weights, in eval mode, with logging off."""
        trainer = self.trainer if self.trainer is not None else detached_trainer(self.module)
        with quiet(self.module, self.loss, trainer, fit=self._fit_values(), datamodule=self.datamodule) as task:
            before = task.version
            task.weights_changed()  # the stages of a question that is open already must not be used in this one
            last = self.own if self.trajectory is None else self.trajectory.checkpoints[-1]
            if last is not None:
                state = last.load()
                _check_same_model(task, state.parameters, last)
                if self._data_notes is None and self.trajectory is not None:
                    task.load(state.parameters, state.buffers, last.step, last.epoch)
                    self._data_notes = check_data(task, self.train, self.trajectory) if self.checks_data else []
                task.load(state.parameters, state.buffers, last.step, last.epoch)
            try:
                yield task
            finally:
                task.weights_returned(before)

    def _fit_values(self) -> FitValues:
        trajectory = self.trajectory
        if trajectory is None:
            return FitValues(given=self.trainer is not None)
        exact = frozenset(checkpoint.step for checkpoint in trajectory.checkpoints)
        return FitValues(trajectory.trainer_values, exact, self.trainer is not None)

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
        with self.quiet() as task:
            examples = self.examples(self.train)
            engine = Engine(task, Reduction.NONE)
            if gradients:
                engine = self._engine(task, *self._planned(task, examples))
            setting = Setting(
                engine,
                examples,
                range(len(examples)),
                self.trajectory,
                self.train.batches,
                reduction_of=functools.partial(self._reduction_of, task, examples),
                own_version=task.version,
            )
            for note in self._data_notes or ():
                setting.warn(note)
            if queries is not None:
                data = self.examples(queries)
                query_task = task if measurement is None else task.measuring(measurement)
                query_engine = Engine(query_task, Reduction.NONE)
                if gradients:
                    query_engine = self._engine(query_task, *self._planned_for(query_task, data, queries, examples))
                setting.queries = Queries(query_engine, data, range(len(data)), mean, measurement is not None)
            if gradients and self.batch_size is None:
                examples.block_size = self._block_size(engine, examples)
            if self._share_of_copies is not None:
                setting.note("`training_step` fails on a batch of one: two copies of an example stand for it alone.")
            try:
                yield setting
            finally:
                for text in notes_of(getattr(self.module, "_trainer", None)):
                    setting.note(text)

    def examples(self, source: Source) -> Examples:
        """The examples of a source, in blocks of ``batch_size``."""
        examples = source.examples(self.batch_size)
        examples.share_of_copies = self._share_of_copies
        return examples

    def _engine(self, task: Task, reduction: Reduction, plan: Plan) -> Engine:
        return Engine(task, reduction, self._groups(), plan=plan)

    def _planned(self, task: Task, examples: Examples) -> tuple[Reduction, Plan]:
        """Reduction and plan of the training examples' gradients, from the self-check."""
        if () not in self._found:
            reduction = self._train_reduction(task, examples, self.names)
            self._found[()] = reduction, make_plan(self._engine(task, reduction, Plan({})), examples, self.names)
        return self._found[()]

    def _planned_for(self, task: Task, data: Examples, queries: Source, examples: Examples) -> tuple[Reduction, Plan]:
        """Reduction and plan of the queries' gradients, from the self-check."""
        reduction, plan = self._found[()]
        if queries is self.train and task.loss is self.loss:
            return reduction, plan
        key = (id(queries.dataset), task.loss)
        if key not in self._found:
            data.check_steady()
            reduction = Reduction.NONE if task.loss is not None else reduction
            with _explained(examples, data):
                self._found[key] = reduction, make_plan(self._engine(task, reduction, Plan({})), data, self.names)
            self._in_use.append(queries.dataset)  # as long as it exists, no other object has its id
        return self._found[key]

    def _train_reduction(self, task: Task, examples: Examples, names: Sequence[str] = ()) -> Reduction:
        if self._reduction is None or names:
            examples.check_steady()
            self._reduction = probe_examples(task, examples, names)
            self._share_of_copies = examples.share_of_copies
        return self._reduction

    def _reduction_of(self, task: Task, examples: Examples, queries: Queries | None) -> Reduction:
        """See ``Setting.reduction_of``. The first query is tried once, so that queries that do not fit are refused."""
        reduction = self._train_reduction(task, examples)
        if queries is None:
            return reduction
        task, data = queries.engine.task, queries.examples
        data.share_of_copies = self._share_of_copies
        key = (id(data.dataset), task.loss)
        if key not in self._checked:
            data.check_steady()
            reduction = Reduction.NONE if task.loss is not None else reduction
            with _explained(examples, data):
                reduction.total(task(task.to_device(data.one(0))), 1)
            self._checked[key] = reduction
            self._in_use.append(data.dataset)
        return self._checked[key]

    def _block_size(self, engine: Engine, examples: Examples) -> int:
        """Larger blocks if the factors of an example's gradient are small: fewer, larger matrix products."""
        if self._large_block is None:
            some = next(examples.blocks(0, min(4, len(examples))))
            each = engine.gradients(some).query_bytes(1)
            self._large_block = max(examples.block_size, min(_BLOCK, _BLOCK_BYTES // max(1, each)))
        return self._large_block

    def _groups(self) -> Mapping[str, int]:
        if self.trajectory is None or self.trajectory.n_groups == 1:
            return {}
        known = self.trajectory.parameter_groups
        return {name: known[name] for name in self.names}


def _check_same_model(task: Task, saved: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Raises ValueError unless a checkpoint has the module's parameters, in their shapes, and no others."""
    mine = {name: tuple(p.shape) for name, p in task.named_parameters().items()}
    theirs = {name: tuple(p.shape) for name, p in saved.items()}
    missing = sorted(mine.keys() - theirs.keys())
    strict = getattr(task.module, "strict_loading", True) is not False
    # Lightning's own files, whose buffers are among the parameters, were compared before.
    more = sorted(theirs.keys() - mine.keys()) if strict and not isinstance(checkpoint, LightningCheckpoint) else []
    other = [
        f"`{n}` {theirs[n]} (module: {mine[n]})" for n in sorted(mine.keys() & theirs.keys()) if mine[n] != theirs[n]
    ]
    if missing or other or more:
        found = [f"no {', '.join(f'`{n}`' for n in missing[:5])}"] * bool(missing) + other[:5]
        found += [f"also {', '.join(f'`{n}`' for n in more[:5])}"] * bool(more)
        loose = "; or set `module.strict_loading = False`, if it needs less" if more and not (missing or other) else ""
        raise ValueError(
            f"Expected checkpoints of this {type(task.module).__name__}, got a checkpoint in {str(checkpoint.path)!r} "
            f"with {'; '.join(found)}. Pass the module that was trained, built with the same arguments{loose}."
        )


@contextlib.contextmanager
def _explained(examples: Examples, queries: Examples) -> Iterator[None]:
    """Turns any error inside into a ValueError that compares the queries' shapes with a training example's."""

    def shapes(data: Examples) -> str:
        leaves = torch.utils._pytree.tree_leaves(data.one(0))
        return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in leaves)

    try:
        yield
    except (RuntimeError, TypeError, IndexError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            "Expected queries that the module's loss accepts (a training example as a batch of one: "
            f"{shapes(examples)}), got {shapes(queries)}: {error}"
        ) from error
