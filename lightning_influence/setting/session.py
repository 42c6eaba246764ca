"""A module and its training data, prepared for questions: quiet, at its final weights, self-checked once for all."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.data.source import Source
from lightning_influence.gradients import Engine, Plan, Reduction, make_plan, probe
from lightning_influence.module.task import Loss, Task, quiet
from lightning_influence.module.trainer_state import detached_trainer
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.trajectory import Trajectory

# A block of training examples is enlarged up to this size while its factors take no more bytes than that.
_BLOCK = 2048
_BLOCK_BYTES = 2**24


@dataclass
class Session:
    """Opens questions on one module and training set; what the self-check found is kept from one to the next.

    Args:
        module: the LightningModule.
        train: its training data.
        trajectory: whose last weights are put in place; None: the module's own.
        trainer: None: a silent one of the module's package stands in.
        loss: per-sample losses, or None for ``training_step``.
        names: the parameters that count.
        batch_size: examples per block, or None.
    """

    module: Any
    train: Source
    trajectory: Trajectory | None
    trainer: Any
    loss: Loss | None
    names: Sequence[str]
    batch_size: int | None
    _found: dict[tuple[Any, ...], tuple[Reduction, Plan]] = field(default_factory=dict)
    _checked: dict[tuple[Any, ...], Reduction] = field(default_factory=dict)
    _kept: list[Any] = field(default_factory=list)
    _fitting: int | None = None
    _reduction: Reduction | None = None

    @contextlib.contextmanager
    def quiet(self) -> Iterator[Task]:
        """The module, silent and at its final weights."""
        trainer = self.trainer if self.trainer is not None else detached_trainer(self.module)
        with quiet(self.module, self.loss, trainer) as task:
            if self.trajectory is not None:
                last = self.trajectory.checkpoints[-1]
                state = last.load()
                _check_same_model(task, state.parameters, self.trajectory)
                task.load(state.parameters, state.buffers, last.step, last.epoch)
            yield task

    @contextlib.contextmanager
    def open(
        self, queries: Source | None = None, measurement: Loss | None = None, mean: bool = False, gradients: bool = True
    ) -> Iterator[Setting]:
        """A question, its tile being the whole training set, until the context ends.

        Args:
            queries: what is asked about.
            measurement: in place of the queries' loss.
            mean: all queries count as one.
            gradients: find out how to take them, and check that. Without it, how a batch's loss relates to those of its
                examples is found out only for a method that reads ``Setting.reduction_of``.

        Raises:
            ValueError: a loss that cannot be divided among examples, queries that do not fit the module.
        """
        with self.quiet() as task:
            examples = self.train.examples(self.batch_size)
            asked = None if queries is None else queries.examples(self.batch_size)
            other = task if measurement is None else task.measuring(measurement)
            engine, theirs = Engine(task, Reduction.NONE), Engine(other, Reduction.NONE)
            if gradients:
                engine = self._engine(task, *self._planned(task, examples))
            if gradients and queries is not None and asked is not None:
                theirs = self._engine(other, *self._planned_for(other, asked, queries, examples))
            setting = Setting(engine, examples, range(len(examples)), self.trajectory, self.train.batches)
            setting.reduction_of = functools.partial(self._reduction_of, task, examples)
            if asked is not None:
                setting.queries = Queries(theirs, asked, range(len(asked)), mean, measurement is not None)
            if gradients and self.batch_size is None:
                examples.block_size = self._block_size(engine, examples)
            yield setting

    def _engine(self, task: Task, reduction: Reduction, plan: Plan) -> Engine:
        return Engine(task, reduction, self._groups(), plan=plan)

    def _planned(self, task: Task, examples: Examples) -> tuple[Reduction, Plan]:
        """The self-check of the training side."""
        if () not in self._found:
            reduction = self._train_reduction(task, examples)
            self._found[()] = reduction, make_plan(self._engine(task, reduction, Plan({})), examples, self.names)
        return self._found[()]

    def _planned_for(self, task: Task, asked: Examples, queries: Source, examples: Examples) -> tuple[Reduction, Plan]:
        """The self-check of the query side."""
        reduction, plan = self._found[()]
        if queries is self.train and task.loss is self.loss:
            return reduction, plan
        key = (id(queries.dataset), task.loss)
        if key not in self._found:
            asked.check_steady()
            reduction = Reduction.NONE if task.loss is not None else reduction
            with _fitting(examples, asked):
                self._found[key] = reduction, make_plan(self._engine(task, reduction, Plan({})), asked, self.names)
            self._kept.append(queries.dataset)  # while it lives, its id is its own
        return self._found[key]

    def _train_reduction(self, task: Task, examples: Examples) -> Reduction:
        if self._reduction is None:
            examples.check_steady()
            self._reduction = probe(task, examples, 0)
        return self._reduction

    def _reduction_of(self, task: Task, examples: Examples, queries: Queries | None) -> Reduction:
        """Of the training side, or of the queries, one of which must then pass."""
        reduction = self._train_reduction(task, examples)
        if queries is None:
            return reduction
        task, asked = queries.engine.task, queries.examples
        key = (id(asked.dataset), task.loss)
        if key not in self._checked:
            asked.check_steady()
            reduction = Reduction.NONE if task.loss is not None else reduction
            with _fitting(examples, asked):
                reduction.total(task(task.to_device(asked.one(0))), 1)
            self._checked[key] = reduction
            self._kept.append(asked.dataset)
        return self._checked[key]

    def _block_size(self, engine: Engine, examples: Examples) -> int:
        """Larger blocks where an example's factors are small: fewer, larger matrix products."""
        if self._fitting is None:
            some = next(iter(examples.blocks(0, min(4, len(examples)))))
            each = engine.gradients(some).query_bytes(1)
            self._fitting = max(examples.block_size, min(_BLOCK, _BLOCK_BYTES // max(1, each)))
        return self._fitting

    def _groups(self) -> Mapping[str, int]:
        if self.trajectory is None or self.trajectory.n_groups == 1:
            return {}
        known = self.trajectory.parameter_groups
        return {name: known[name] for name in self.names}


def _check_same_model(task: Task, saved: Mapping[str, Tensor], trajectory: Trajectory) -> None:
    """Raises where a checkpoint's parameters are not those of the module."""
    mine = {name: tuple(p.shape) for name, p in task.named_parameters().items()}
    theirs = {name: tuple(p.shape) for name, p in saved.items()}
    missing = sorted(mine.keys() - theirs.keys())
    other = [
        f"`{n}` {theirs[n]} (module: {mine[n]})" for n in sorted(mine.keys() & theirs.keys()) if mine[n] != theirs[n]
    ]
    if missing or other:
        found = [f"no {', '.join(f'`{n}`' for n in missing[:5])}"] * bool(missing) + other[:5]
        where = trajectory.path or trajectory.checkpoints[-1].path
        raise ValueError(
            f"Expected checkpoints of this {type(task.module).__name__}, got a checkpoint in {str(where)!r} with "
            f"{'; '.join(found)}. Pass the module that was trained, built with the same arguments."
        )


@contextlib.contextmanager
def _fitting(examples: Examples, queries: Examples) -> Iterator[None]:
    """Whatever goes wrong inside, the queries do not fit the module."""

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
