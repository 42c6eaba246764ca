"""The question's setting: a module, its training data and what its fit left behind; asks methods, returns scores."""

import contextlib
import fnmatch
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from lightning_influence.examples import Examples
from lightning_influence.gradients import Engine, Plan, Reduction, make_plan, probe
from lightning_influence.gradients.check import agreed
from lightning_influence.method import Evidence, Method
from lightning_influence.module import Loss, Task, clean, quiet, unwrapped
from lightning_influence.progress import progress
from lightning_influence.scores import Scores, SelfScores, TopK
from lightning_influence.setting import Queries, Setting
from lightning_influence.sinks import GroupSink, MatrixSink, NonFinite, Sink, TopKSink
from lightning_influence.sources import Source, source_of
from lightning_influence.trajectory import Trajectory
from lightning_influence.types import MissingEvidence

# Scores held at once while checkpoints are summed over, and bytes for the gradients of a block of queries.
_TILE = 2**25
_QUERY_BYTES = 2**29


@dataclass
class _Session:
    """The module made ready: engines for both sides, under one plan."""

    task: Task
    train: Engine
    train_examples: Examples
    query: Engine | None = None
    query_examples: Examples | None = None


class Attributor:
    """Asks what the training examples did to a module.

    Args:
        module: the LightningModule.
        train: the training DataLoader or Dataset; an un-augmented one of equal length serves as well.
        trajectory: what the fit left behind; None: only the module's present weights are known.
        trainer: its accelerator, precision and data hooks are used; None: the module's own Trainer if it has one.
        batch_size: examples per block; None: the loader's batch size, or more where examples are small.
        refit: how models are trained again (for methods that retrain).
        loss: ``(module, batch) -> [batch]`` per-sample losses; None: ``training_step``.
        parameters: patterns (``fnmatch``) over parameter names; None: all that train.

    Raises:
        TypeError: data without examples by number.
        ValueError: empty data, a dataset of another length than the one trained on, or patterns that match nothing.

    Example:
        >>> attributor = Attributor(model, train=train_dataset, trajectory=trajectory)  # doctest: +SKIP
        >>> attributor.score(TracInCP(), queries=test_dataset).proponents(k=5)  # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913
        self,
        module: Any,
        train: Any,
        trajectory: Trajectory | None = None,
        trainer: Any = None,
        batch_size: int | None = None,
        refit: Any = None,
        loss: Loss | None = None,
        parameters: str | Sequence[str] | None = None,
    ) -> None:
        self.module = unwrapped(module)
        self.trajectory = trajectory
        self.trainer = trainer if trainer is not None else getattr(self.module, "_trainer", None)
        self.refit = refit
        self.loss = loss
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"Expected `batch_size` to be a positive integer or None, got {batch_size!r}.")
        self.batch_size = batch_size
        self._patterns = (parameters,) if isinstance(parameters, str) else parameters
        self._train = source_of(train, "train")
        self._plans: dict[tuple[Any, ...], tuple[Reduction, Reduction, Plan]] = {}
        if trajectory is not None and trajectory.dataset_size not in (None, len(self._train.dataset)):
            raise ValueError(
                f"Expected `train` to have the {trajectory.dataset_size} examples of the dataset that was trained on, "
                f"got {len(self._train.dataset)}. Pass that dataset (an un-augmented one of equal length is fine)."
            )
        self._names = self._selected()

    # ---- questions ------------------------------------------------------------------------------------------------

    def score(  # noqa: PLR0913
        self,
        method: Method,
        queries: Any,
        top_k: int | None = None,
        measurement: Loss | None = None,
        higher_is_better: bool = False,
        aggregate: str | None = None,
        path: str | PathLike[str] | None = None,
    ) -> Scores:
        """Scores of every training example on every query.

        Args:
            method: how influence is estimated.
            queries: Dataset, DataLoader or ``"train"``; their loss is ``training_step``'s (or ``loss=``).
            top_k: keep the k strongest proponents and opponents of each query; None: the full matrix.
            measurement: ``(module, batch) -> [batch]`` in place of the query's loss.
            higher_is_better: of the measurement; positive scores still mean *makes it better*.
            aggregate: ``"mean"``: all queries as one.
            path: also save the scores in this file.

        Returns:
            ``Scores`` [query, train].

        Raises:
            MissingEvidence: the method needs what was not captured.
            ValueError: bad arguments, queries that do not fit the module, gradients that are not finite.
        """
        self._check(method, top_k, aggregate, measurement, higher_is_better)
        source = self._queries(queries)
        with self._session(source, measurement) as session:
            setting, asked = self._ask(session, aggregate)
            like = setting.zeros(asked[:0])
            n_queries, dtype = len(asked), like.dtype
            sink: Sink
            if top_k is None:
                sink = matrix = MatrixSink(n_queries, len(self._train.dataset), dtype)
            else:
                sink = best = TopKSink(n_queries, top_k, dtype)
            self._run(method, setting, asked, sink, -1.0 if higher_is_better else 1.0)
        record = self._record(method, setting)
        base = (self._train.base_ids(), None if aggregate else source.base_ids())
        record |= {"train_ids": torch.arange(len(self._train.dataset)), "query_ids": torch.arange(n_queries), "base": base}
        if top_k is None:
            scores = Scores(matrix.values, None, **record)
        else:
            high, high_ids, low, low_ids = best.kept.result()
            scores = Scores(None, (TopK(high, high_ids), TopK(low, low_ids)), **record)
        if path is not None:
            scores.save(path)
        return scores

    def self_influence(self, method: Method, path: str | PathLike[str] | None = None) -> SelfScores:
        """Score of every training example on itself; mislabelled, odd and memorised ones stand highest.

        Raises:
            MissingEvidence: the method needs what was not captured.
            NotImplementedError: the method has no self-influence.
            ValueError: self-influence that would be constant; gradients that are not finite.
        """
        self._check(method)
        with self._session() as session:
            n = len(self._train.dataset)
            setting = self._setting(session, range(n))
            steps = n * max(1, len(method.positions(self.trajectory)))
            with progress(self.trainer, steps, f"{type(method).__name__} self-influence") as done:
                setting.on_block = done
                values = method.self_influence(setting).cpu()
        bad = NonFinite()
        bad.clean(values[None], 0, 0)
        bad.queries.clear()
        bad.train = (~values.isfinite()).nonzero()[:, 0].tolist()
        bad.refuse()
        scores = SelfScores(
            train_ids=torch.arange(n), values=values, base=self._train.base_ids(), **self._record(method, setting)
        )
        if path is not None:
            scores.save(path)
        return scores

    def group(self, method: Method, ids: Sequence[int], queries: Any) -> Tensor:
        """[query]: the method's own estimate of what a group of training examples did together.

        Raises:
            ValueError: ids outside the training dataset.
        """
        self._check(method)
        wrong = [i for i in ids if not 0 <= i < len(self._train.dataset)]
        if wrong:
            raise ValueError(f"Expected `ids` below {len(self._train.dataset)}, got {wrong[:5]!r}.")
        with self._session(self._queries(queries)) as session:
            setting, asked = self._ask(session, None)
            sink = GroupSink(len(asked), ids)
            self._run(method, setting, asked, sink, 1.0)
        return sink.total

    def losses(self, data: Any = "train") -> Tensor:
        """[example]: the loss of every example at the final weights, one at a time; the baseline for label errors."""
        source = self._queries(data)
        examples = source.examples(self.batch_size)
        with self._quiet() as task, torch.no_grad():
            self._load_final(task)
            values = [float(task(task.to_device(examples.one(i))).sum()) for i in range(len(examples))]
        return torch.tensor(values, dtype=torch.float64)

    def cost(self, method: Method, queries: Any = None, aggregate: str | None = None) -> float:
        """Seconds that ``score`` (or, without queries, ``self_influence``) will take, by timing one block of each."""
        self._check(method, aggregate=aggregate)
        source = None if queries is None else self._queries(queries)
        with self._session(source) as session:
            train, examples = session.train, session.train_examples
            block = next(iter(examples.blocks(0, min(len(examples), examples.block_size))))
            one_block = _timed(lambda: train.gradients(block).norm2())
            seconds = one_block * len(examples) / block.size
            if source is not None and session.query_examples is not None:
                some = min(len(session.query_examples), session.query_examples.block_size)
                asked = Queries(self._required_query(session), session.query_examples, range(some), aggregate == "mean")
                gradients = asked.gradients()
                one_product = _timed(lambda: gradients.dot(train.gradients(block))) - one_block
                share = 1 if aggregate else len(session.query_examples) / some
                tiles, columns = self._tiling(session, len(asked) if aggregate else len(session.query_examples))
                seconds += max(0.0, one_product) * share * len(examples) / block.size
                seconds = seconds * tiles + _timed(asked.gradients) * len(session.query_examples) / some * columns
        return seconds * max(1, len(method.positions(self.trajectory)))

    # ---- making ready ---------------------------------------------------------------------------------------------

    def _check(
        self,
        method: Method,
        top_k: int | None = None,
        aggregate: str | None = None,
        measurement: Loss | None = None,
        higher_is_better: bool = False,
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"Expected `method` to be a Method such as `TracInCP()`, got {method!r}.")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"Expected `top_k` to be a positive integer or None, got {top_k!r}.")
        if aggregate not in (None, "mean"):
            raise ValueError(f"Expected `aggregate` to be None or 'mean', got {aggregate!r}.")
        if higher_is_better and measurement is None:
            raise ValueError("Expected `measurement=` with `higher_is_better=True`, got None: a loss is better when low.")
        name = type(method).__name__
        if method.needs & Evidence.CHECKPOINTS and self.trajectory is None:
            raise MissingEvidence(
                f"`{name}` needs checkpoints with learning rates, got `trajectory=None`. Fit with "
                "`Trainer(callbacks=[Influence()])`, read files by `Trajectory.from_checkpoints(paths)`, or use "
                "`GradientDot()`, which needs the final weights only."
            )
        if method.needs & Evidence.TRACKER:
            raise MissingEvidence(
                f"`{name}` watches training as it happens and cannot be asked afterwards. "
                f"Fit with `Trainer(callbacks=[Influence([{name}(...)])])`, or use `TracInCP()`."
            )
        if method.needs & Evidence.REFIT and self.refit is None:
            raise MissingEvidence(f"`{name}` trains models again. Pass `Attributor(..., refit=Refit(...))`.")

    def _queries(self, queries: Any) -> Source:
        if isinstance(queries, str) and queries != "train":
            raise ValueError(
                f"Expected `queries` to be a Dataset, a DataLoader or 'train', got {queries!r}. Other loaders of the "
                "Trainer are known to `Influence(queries=)` only."
            )
        return self._train if isinstance(queries, str) else source_of(queries, "queries", like=self._train)

    def _selected(self) -> list[str]:
        parameters = {clean(name): p for name, p in self.module.named_parameters() if p.requires_grad}
        if self.trajectory is not None:
            trained = self.trajectory.parameter_groups
            parameters = {name: p for name, p in parameters.items() if name in trained}
        if not parameters:
            raise ValueError(
                "Expected parameters that train, got none: all are frozen, or the trajectory is of another module. "
                "Call `requires_grad_(True)` on those that were trained."
            )
        if self._patterns is None:
            return list(parameters)
        for pattern in self._patterns:
            if not fnmatch.filter(parameters, pattern):
                raise ValueError(
                    f"Expected `parameters` to match trainable parameters, got {pattern!r}, which matches none of "
                    f"{', '.join(list(parameters)[:10])}{' ...' if len(parameters) > 10 else ''}."
                )
        return [name for name in parameters if any(fnmatch.fnmatchcase(name, p) for p in self._patterns)]

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[Task]:
        trainer = self.trainer if self.trainer is not None else _own_trainer(self.module)
        with quiet(self.module, self.loss, trainer) as task:
            yield task

    @contextlib.contextmanager
    def _session(self, queries: Source | None = None, measurement: Loss | None = None) -> Iterator[_Session]:
        examples = self._train.examples(self.batch_size)
        asked = None if queries is None else queries.examples(self.batch_size)
        groups = self._groups()
        with self._quiet() as task:
            self._load_final(task)
            other = task if measurement is None else Task(task.module, measurement, task.device, task.trainer)
            reduction, query_reduction, plan = self._plan(task, examples, other, asked, (queries, measurement))
            train = Engine(task, reduction, groups, plan=plan)
            query = None if asked is None else Engine(other, query_reduction, groups, plan=plan)
            try:
                yield _Session(task, train, examples, query, asked)
            finally:
                examples.close()
                if asked is not None:
                    asked.close()

    def _plan(
        self, task: Task, examples: Examples, other: Task, asked: Examples | None, about: tuple[Source | None, Any]
    ) -> tuple[Reduction, Reduction, Plan]:
        """The self-check of both sides, made once for the same data and measurement."""
        queries, measurement = about
        key = (None if queries is None else id(queries.dataset), measurement)
        if key in self._plans:
            return self._plans[key]
        if (None, None) not in self._plans:
            reduction = probe(task, examples, 0)
            plan = make_plan(Engine(task, reduction, self._groups()), examples, self._names)
            self._plans[None, None] = reduction, reduction, plan
        reduction, query_reduction, plan = self._plans[None, None]
        if asked is not None and (queries is not self._train or measurement is not None):
            query_reduction = Reduction.NONE if other.loss is not None else reduction
            try:
                theirs = make_plan(Engine(other, query_reduction, self._groups()), asked, self._names)
            except (RuntimeError, TypeError, IndexError, KeyError, ValueError) as error:
                raise ValueError(_misfit(error, examples, asked)) from error
            plan = agreed(plan, theirs)
        self._plans[key] = reduction, query_reduction, plan
        return self._plans[key]

    def _groups(self) -> Mapping[str, int]:
        if self.trajectory is None or self.trajectory.n_groups == 1:
            return {}
        known = self.trajectory.parameter_groups
        return {name: known[name] for name in self._names}

    def _load_final(self, task: Task) -> None:
        if self.trajectory is None:
            return
        state = self.trajectory.checkpoints[-1].load()
        _check_same_model(task, state.parameters, self.trajectory)
        task.load(state.parameters, state.buffers)

    def _setting(self, session: _Session, ids: range) -> Setting:
        return Setting(session.train, session.train_examples, ids, self.trajectory, self._train.batches)

    # ---- running --------------------------------------------------------------------------------------------------

    def _ask(self, session: _Session, aggregate: str | None) -> tuple[Setting, "_Asked"]:
        examples = session.query_examples
        if examples is None:
            raise ValueError("Expected `queries`, got None.")
        n = len(self._train.dataset)
        return self._setting(session, range(n)), _Asked(self._required_query(session), examples, aggregate == "mean")

    def _required_query(self, session: _Session) -> Engine:
        if session.query is None:
            raise ValueError("Expected `queries`, got None.")
        return session.query

    def _tiling(self, session: _Session, n_queries: int) -> tuple[int, int]:
        """How often the training data are passed through, and how often each query's gradient is taken."""
        block = self._query_block(session, n_queries)
        columns = _tile_columns(min(block, n_queries), session.train_examples)
        return -(-n_queries // block), -(-len(session.train_examples) // columns)

    def _query_block(self, session: _Session, n_queries: int) -> int:
        examples, engine = session.query_examples, self._required_query(session)
        if examples is None or n_queries == 1:
            return max(1, n_queries)
        some = next(iter(examples.blocks(0, min(4, len(examples)))))
        return max(1, min(n_queries, _QUERY_BYTES // max(1, engine.gradients(some).query_bytes(n_queries))))

    def _run(self, method: Method, setting: Setting, asked: "_Asked", sink: Sink, sign: float) -> None:
        n_train, n_queries = setting.n_train, len(asked)
        session = _Session(setting.engine.task, setting.engine, setting.examples, asked.engine, asked.examples)
        block = self._query_block(session, n_queries)
        block = max(asked.examples.block_size * (block // asked.examples.block_size), min(block, asked.examples.block_size))
        columns = _tile_columns(min(block, n_queries), setting.examples)
        stages = max(1, len(method.positions(self.trajectory)))
        bad = NonFinite()
        passes = -(-n_queries // block)
        with progress(self.trainer, n_train * stages * passes, type(method).__name__) as done:
            setting.on_block = done
            for first in range(0, n_queries, block):
                queries = asked[first : first + block]
                for start in range(0, n_train, columns):
                    setting.ids = range(start, min(start + columns, n_train))
                    tile = method.score(setting, queries)
                    _check_shape(method, tile, len(queries), len(setting.ids))
                    if bad.clean(tile, first, start):
                        sink.take(tile if sign > 0 else -tile, first, start)
        bad.refuse()

    def _record(self, method: Method, setting: Setting) -> dict[str, Any]:
        positions = [] if self.trajectory is None else method.positions(self.trajectory)
        checkpoints = [] if self.trajectory is None else [self.trajectory.checkpoints[i].step for i in positions]
        notes = [*setting.notes, setting.engine.plan.summary(setting.engine.task.named_parameters())]
        if self.trajectory is not None:
            notes += self.trajectory.notes
        return {
            "method": type(method).__name__,
            "settings": method.settings(),
            "units": method.unit(setting),
            "notes": notes,
            "checkpoints": checkpoints,
        }


@dataclass(frozen=True)
class _Asked:
    """All queries, to be taken in slices."""

    engine: Engine
    examples: Examples
    mean: bool

    def __len__(self) -> int:
        return 1 if self.mean else len(self.examples)

    def __getitem__(self, part: slice) -> Queries:
        every = range(len(self.examples))
        return Queries(self.engine, self.examples, every if self.mean else every[part], self.mean)


def _tile_columns(n_queries: int, examples: Examples) -> int:
    """Training examples per tile: whole blocks of them."""
    blocks = max(1, _TILE // max(1, n_queries) // examples.block_size)
    return blocks * examples.block_size


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of the faster of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _check_shape(method: Method, tile: Tensor, n_queries: int, n_train: int) -> None:
    if tile.shape != (n_queries, n_train):
        raise ValueError(
            f"Expected `{type(method).__name__}.score` to return [query, train] = {[n_queries, n_train]}, "
            f"got {list(tile.shape)}."
        )


def _check_same_model(task: Task, saved: Mapping[str, Tensor], trajectory: Trajectory) -> None:
    """Raises where a checkpoint's parameters are not those of the module."""
    mine = {name: tuple(p.shape) for name, p in task.named_parameters().items()}
    theirs = {name: tuple(p.shape) for name, p in saved.items()}
    missing = sorted(mine.keys() - theirs.keys())
    other = [f"`{n}` {theirs[n]} (module: {mine[n]})" for n in sorted(mine.keys() & theirs.keys()) if mine[n] != theirs[n]]
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


def _own_trainer(module: Any) -> Any:
    """Without a Trainer, a silent one of the module's own package stands in for ``self.trainer``."""
    import importlib
    import logging

    for base in type(module).__mro__:
        package = base.__module__.partition(".core")[0]
        if base.__name__ == "LightningModule" and package in ("pytorch_lightning", "lightning.pytorch"):
            lightning = importlib.import_module(package)
            level = logging.getLogger(package).level
            logging.getLogger(package).setLevel(logging.ERROR)
            try:
                return lightning.Trainer(
                    accelerator="cpu" if module.device.type == "cpu" else "auto",
                    devices=1,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
            finally:
                logging.getLogger(package).setLevel(level)
    return None
