"""A module made ready for one question: quiet, at its final weights, with engines that the self-check has planned."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.data.source import Source
from lightning_influence.gradients import Engine, Plan, Reduction, make_plan, probe
from lightning_influence.module.task import Loss, Task, detached_trainer, quiet
from lightning_influence.setting.setting import Queries
from lightning_influence.trajectory import Trajectory

# Bytes that the gradients of a block of queries may take.
_QUERY_BYTES = 2**29
# A block of training examples is enlarged up to this size while its factors take no more bytes than that.
_BLOCK = 2048
_BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class AllQueries:
    """All queries, to be taken in slices.

    Args:
        engine: takes their gradients.
        examples: their dataset.
        mean: all of them count as one.
    """

    engine: Engine
    examples: Examples
    mean: bool

    def __len__(self) -> int:
        return 1 if self.mean else len(self.examples)

    def __getitem__(self, part: slice) -> Queries:
        every = range(len(self.examples))
        return Queries(self.engine, self.examples, every if self.mean else every[part], self.mean)

    def block(self) -> int:
        """How many queries are held at once: as many whole blocks of the dataset as fit the memory set aside."""
        if len(self) == 1:
            return 1
        some = next(iter(self.examples.blocks(0, min(4, len(self.examples)))))
        each = self.engine.gradients(some).query_bytes(len(self))
        fitting = max(1, _QUERY_BYTES // max(1, each))
        return whole_blocks(fitting, self.examples.block_size)


def whole_blocks(count: int, size: int) -> int:
    """At most ``count`` examples that are whole blocks of ``size``, where one fits."""
    return count // size * size if count >= size else count


@dataclass
class Session:
    """Engines for both sides of a score, under one plan.

    Args:
        task: the quiet module.
        engine: takes gradients of training examples.
        examples: the training dataset.
        asked: the queries, where there are any.
        models: models trained again, where the question is put to them.
    """

    task: Task
    engine: Engine
    examples: Examples
    asked: AllQueries | None = None
    models: Any = None


@dataclass
class Sessions:
    """Opens sessions on one module and training set; what the self-check found is kept from one to the next.

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
        self,
        queries: Source | None = None,
        measurement: Loss | None = None,
        mean: bool = False,
        gradients: bool = True,
        forward_only: bool = False,
    ) -> Iterator[Session]:
        """Everything that a method needs, until the context ends; without ``gradients`` none are planned or checked.

        Args:
            queries: what is asked about.
            measurement: in place of the queries' loss.
            mean: all queries count as one.
            gradients: plan how to take them, and check that.
            forward_only: nor is it asked how a batch's loss relates to those of its examples.

        Raises:
            ValueError: a loss that cannot be divided among examples, queries that do not fit the module.
        """
        groups = self._groups()
        with self.quiet() as task:
            examples = self.train.examples(self.batch_size)
            if forward_only:
                yield self._forward_only(task, examples, queries, measurement, mean)
                return
            reduction, plan = self._planned(task, examples, gradients)
            asked = None
            if queries is not None:
                theirs = queries.examples(self.batch_size)
                other = task if measurement is None else task.measuring(measurement)
                their_reduction, their_plan = self._planned_for(other, theirs, queries, examples, gradients)
                asked = AllQueries(Engine(other, their_reduction, groups, plan=their_plan), theirs, mean)
            engine = Engine(task, reduction, groups, plan=plan)
            if self.batch_size is None and gradients:
                examples.block_size = self._block_size(engine, examples)
            yield Session(task, engine, examples, asked)

    def _forward_only(
        self, task: Task, examples: Examples, queries: Source | None, measurement: Loss | None, mean: bool
    ) -> Session:
        """A session whose engines have no plan: they carry the task."""
        asked = None
        if queries is not None:
            other = task if measurement is None else task.measuring(measurement)
            asked = AllQueries(Engine(other, Reduction.NONE), queries.examples(self.batch_size), mean)
        return Session(task, Engine(task, Reduction.NONE), examples, asked)

    def _planned(self, task: Task, examples: Examples, gradients: bool) -> tuple[Reduction, Plan]:
        """The self-check of the training side."""
        if self._reduction is None:
            examples.check_steady()
            self._reduction = probe(task, examples, 0)
        if not gradients:
            return self._reduction, Plan({})
        if () not in self._found:
            engine = Engine(task, self._reduction, self._groups())
            self._found[()] = self._reduction, make_plan(engine, examples, self.names)
        return self._found[()]

    def _planned_for(
        self, task: Task, asked: Examples, queries: Source, examples: Examples, gradients: bool
    ) -> tuple[Reduction, Plan]:
        """The self-check of the query side."""
        reduction, plan = self._planned(task, examples, gradients)
        if queries is self.train and task.loss is self.loss:
            return reduction, plan
        key = (id(queries.dataset), task.loss, gradients)
        if key not in self._found:
            asked.check_steady()
            reduction = Reduction.NONE if task.loss is not None else reduction
            try:
                if gradients:
                    theirs = make_plan(Engine(task, reduction, self._groups()), asked, self.names)
                else:
                    reduction.total(task(task.to_device(asked.one(0))), 1)
                    theirs = plan
            except (RuntimeError, TypeError, IndexError, KeyError, ValueError, AttributeError) as error:
                raise ValueError(_misfit(error, examples, asked)) from error
            self._found[key] = reduction, theirs
            self._kept.append(queries.dataset)  # while it lives, its id is its own
        return self._found[key]

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


def _misfit(error: Exception, examples: Examples, asked: Examples) -> str:
    def shapes(data: Examples) -> str:
        leaves = torch.utils._pytree.tree_leaves(data.one(0))
        return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in leaves)

    return (
        f"Expected queries that the module's loss accepts (a training example as a batch of one: {shapes(examples)}), "
        f"got {shapes(asked)}: {error}"
    )
