"""A module and its training data, prepared for questions: final weights, logging off, gradients checked once."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.data.source import Source
from lightning_influence.gradients import Engine, Plan, Reduction, make_plan, probe_examples
from lightning_influence.gradients.index_check import gradient_at, joined
from lightning_influence.module.quiet import quiet
from lightning_influence.module.task import Loss, Task
from lightning_influence.module.trainer_answers import notes_of
from lightning_influence.module.trainer_reads import FitValues
from lightning_influence.module.trainer_state import detached_trainer
from lightning_influence.setting.batch_index import BatchIndex
from lightning_influence.setting.explained import explained
from lightning_influence.setting.own_counters import note_changing
from lightning_influence.setting.same_data import check_data
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.setting.token_weights import TokenWeights, describe, probe
from lightning_influence.setting.training_mode import note_on_training
from lightning_influence.setting.unreached import Unreached, refuse_all_unreached
from lightning_influence.trajectory import Checkpoint, LightningCheckpoint, Trajectory

# Blocks of training examples are enlarged up to this many examples while their gradients' factors fit in these bytes.
_BLOCK = 2048
_BLOCK_BYTES = 2**24
# Batches per epoch where they are unknown.
_BATCHES = 1000


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
    _at_index: dict[int | None, tuple[int, int] | None] = field(default_factory=dict)
    _of_clock: dict[tuple[str, int], tuple[int, int] | None] = field(default_factory=dict)
    _counted: list[str] = field(default_factory=list)
    _large_block: int | None = None
    _tokens: TokenWeights = field(default_factory=TokenWeights)
    _asked: Source | None = None
    _share_of_copies: float | None = None
    _unreached: Unreached = field(default_factory=Unreached)

    def ending_with(self, own: Checkpoint, trajectory: Trajectory | None) -> "Session":
        """A session with other final weights; what was found about gradients at these weights is found again."""
        fresh: dict[str, Any] = {
            part.name: part.default if part.default_factory is MISSING else part.default_factory()
            for part in fields(self)
            if part.name.startswith("_")
        }
        return replace(self, own=own, trajectory=trajectory, **fresh)

    @contextlib.contextmanager
    def quiet(self, asked: bool = False) -> Iterator[Task]:
        """The module at its final weights, in eval mode, with logging off.

        Args:
            asked: a question begins, before which data and module are compared with those of the fit.
        """
        trainer = self.trainer if self.trainer is not None else detached_trainer(self.module)
        fit = fit_values(self.trajectory, self.trainer is not None)
        with quiet(self.module, self.loss, trainer, fit=fit, datamodule=self.datamodule) as task:
            before = task.version
            task.numbers = {} if self.trajectory is None else self.trajectory.numbers
            task.weights_changed()  # the stages of a question that is open already must not be used in this one
            last = self.own if self.trajectory is None else self.trajectory.checkpoints[-1]
            if last is not None:
                state = last.load()
                _check_same_model(task, state.parameters, last)
                if (asked or self._data_notes is None) and self.checks_data and self.trajectory is not None:
                    task.load(state.parameters, state.buffers, last.step, last.epoch)
                    again = self._data_notes is not None  # somebody may have changed either since
                    notes = check_data(task, self.train, self.trajectory, again)
                    self._data_notes = list(dict.fromkeys([*(self._data_notes or ()), *notes]))
                task.load(state.parameters, state.buffers, last.step, last.epoch)
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
        self._asked = queries
        with self.quiet(asked=True) as task, contextlib.ExitStack() as stack:
            examples = self.examples(self.train)
            index = self.batch_index(task, examples)
            stack.enter_context(task.at(index.first))
            engine = Engine(task, Reduction.NONE)
            if gradients:
                engine = self._engine(task, examples, *self._planned(task, examples, index), trained=True)
            setting = Setting(
                engine,
                examples,
                range(len(examples)),
                self.trajectory,
                self.train.batches,
                draws=functools.cache(self.train.draws),
                reduction_of=functools.partial(self._reduction_of, task, examples),
                batch_index=index,
                own_version=task.version,
                refused=self._unreached.error,
                notes=[] if self._unreached.note is None else [self._unreached.note],
            )
            for note in note_changing(task, examples, self.names, self.trajectory, self._counted):
                setting.note(note)
            for note in self._data_notes or ():
                setting.warn(note)
            if engine.weights is not None:
                setting.note(describe(engine.weights))
            if queries is not None:
                data = self.examples(queries)
                query_task = task if measurement is None else task.measuring(measurement)
                query_engine = Engine(query_task, Reduction.NONE)
                if gradients:
                    planned = self._planned_for(query_task, data, queries, examples)
                    query_engine = self._engine(query_task, data, *planned)
                    refuse_all_unreached(query_engine, measurement is not None, self._unreached.error)
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

    def _engine(
        self, task: Task, examples: Examples, reduction: Reduction, plan: Plan, trained: bool = False
    ) -> Engine:
        weights = self._tokens.of(task, examples, reduction)
        data = examples if trained else None
        return Engine(task, reduction, self._groups(), plan=plan, examples=data, weights=weights)

    def batch_index(self, task: Task, examples: Examples) -> BatchIndex:
        """Which indices batches had in the fit, and how to find whether the loss depends on them."""
        trajectory = self.trajectory
        recorded = None if trajectory is None else trajectory.batch_indices
        known = trajectory is not None and recorded is not None and trajectory.has_batch_order
        run = None if task.loss is not None else gradient_at(task, examples, self.names, task.at)
        met = recorded or range(self.train.batches or _BATCHES)
        return BatchIndex(run, task.reads_index, met, known, found=self._at_index, of_clock=self._of_clock)

    def _planned(self, task: Task, examples: Examples, index: BatchIndex) -> tuple[Reduction, Plan]:
        """Reduction and plan of the training examples' gradients, from the self-check."""
        if () not in self._found:
            reduction = self._train_reduction(task, examples, self.names)
            plan = make_plan(self._engine(task, examples, reduction, Plan({}), trained=True), examples, self.names)
            pair = index.differing(self.last)
            if pair is not None:
                with task.at(pair[1]):
                    other = probe_examples(task, examples, self.names).reduction
                    engine = self._engine(task, examples, other, Plan({}), trained=True)
                    plan = joined(plan, make_plan(engine, examples, self.names))
                if other is not reduction:
                    raise ValueError(
                        f"Expected one reduction of the loss of a batch, got {reduction.value!r} at `batch_idx="
                        f"{pair[0]}` and {other.value!r} at {pair[1]}. Pass `loss=`, a callable (module, batch) -> "
                        "[batch] of per-sample losses."
                    )
            self._found[()] = reduction, plan
            version = task.version
            engine = self._engine(task, examples, reduction, plan)
            self._unreached = Unreached.of(engine, examples, self.trajectory)
            if self._unreached == Unreached():
                frozen = () if self.trajectory is None else self.trajectory.eval_modules
                self._unreached = Unreached(note=note_on_training(engine, examples, frozen))
            task.weights_returned(version)
        return self._found[()]

    @property
    def last(self) -> int | None:
        """Position of the last checkpoint in the trajectory."""
        return None if self.trajectory is None else len(self.trajectory.checkpoints) - 1

    def _planned_for(self, task: Task, data: Examples, queries: Source, examples: Examples) -> tuple[Reduction, Plan]:
        """Reduction and plan of the queries' gradients, from the self-check."""
        reduction, plan = self._found[()]
        if queries is self.train and task.loss is self.loss:
            return reduction, plan
        key = (id(queries.dataset), task.loss)
        if key not in self._found:
            data.check_steady()
            reduction = Reduction.NONE if task.loss is not None else reduction
            with explained(examples, data):
                self._found[key] = reduction, make_plan(self._engine(task, data, reduction, Plan({})), data, self.names)
            self._in_use.append(queries.dataset)  # as long as it exists, no other object has its id
        return self._found[key]

    def _train_reduction(self, task: Task, examples: Examples, names: Sequence[str] = ()) -> Reduction:
        if self._tokens.probed is None or (names and not self._tokens.again):
            examples.check_steady()
            self._tokens.probed = probe(task, examples, names)
            self._share_of_copies = examples.share_of_copies
        return self._tokens.probed.reduction

    def probe_again(self, block: Sequence[int]) -> bool:
        """Probe the loss once more with some examples of a batch, one of which does not weigh as it does alone.

        Returns:
            Whether the loss is a mean over tokens, of which the examples probed so far had equally many.
        """
        if self._tokens.probed is None or self._tokens.probed.reduction is not Reduction.MEAN:
            return False
        with self.quiet() as task:
            for source in (self.train, self._asked):
                if source is None or max(block) >= len(source.dataset):
                    continue
                if self._tokens.find_again(task, self.examples(source), self.names, block):
                    self._found.clear()
                    self._checked.clear()
                    return True
        return False

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
            with explained(examples, data):
                reduction.total(task(task.to_device(data.one(0))), 1)
            self._checked[key] = reduction
            self._in_use.append(data.dataset)
        return self._checked[key]

    def _block_size(self, engine: Engine, examples: Examples) -> int:
        """Larger blocks if the factors of an example's gradient are small: fewer, larger matrix products."""
        if self._large_block is None:
            some = next(examples.blocks(0, min(4, len(examples))))
            each = engine.gradients(some, checked=False).query_bytes(1)
            self._large_block = max(examples.block_size, min(_BLOCK, _BLOCK_BYTES // max(1, each)))
        return self._large_block

    def _groups(self) -> Mapping[str, int]:
        if self.trajectory is None or self.trajectory.n_groups == 1:
            return {}
        known = self.trajectory.parameter_groups
        return {name: known[name] for name in self.names}


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
