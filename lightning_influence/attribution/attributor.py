"""Attributor: scores of a module's training examples by any method."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from lightning_influence.attribution.accumulators import MatrixAccumulator, TopKAccumulator
from lightning_influence.attribution.data_arguments import datamodule_of, named_queries, training_source
from lightning_influence.attribution.driver import run_group, run_scores, run_self_influence
from lightning_influence.attribution.final_weights import final_weights
from lightning_influence.attribution.parameter_selection import selected_parameters
from lightning_influence.checks import check_flag, check_integer
from lightning_influence.data.source import Source, source_of
from lightning_influence.methods.kinds import ForwardOnly
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.methods.retraining import Estimate, Retraining
from lightning_influence.module.layers import make_layers
from lightning_influence.module.task import Loss, is_half, unwrapped
from lightning_influence.refit import Refit
from lightning_influence.scores import Scores, SelfScores
from lightning_influence.scores.id_checks import whole_numbers
from lightning_influence.setting.session import Session
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.tracking.record import load_record
from lightning_influence.trajectory import Trajectory, fitted_trajectory
from lightning_influence.types import MissingEvidence


class Attributor:
    """Computes the influence of the training examples on a module.

    Args:
        module: the LightningModule.
        train: the training DataLoader or Dataset, or one of the same examples without augmentation; None: that of the
            DataModule.
        trajectory: checkpoints and batch order of the fit; None: only the module's present weights are known.
        trainer: its accelerator, precision and data hooks are used; None: the module's own Trainer, if it has one.
        batch_size: examples per block; None: the loader's batch size, or more if their gradients are small.
        refit: a ``Refit``, which says how to retrain models, for methods that need it.
        loss: ``(module, batch) -> [batch]`` per-sample losses; None: ``training_step``.
        parameters: ``fnmatch`` patterns of the names of parameters whose gradients are used; None: all that train.
        weights: what methods that need the final weights alone use: ``"last"``, after the last step; ``"best"``, of
            ``ModelCheckpoint``; ``"averaged"``, of Lightning's EMA and SWA; or the path of a ``.ckpt`` file, of which
            what ``load_from_checkpoint`` gives is read. Methods that follow the fit are not changed by it.
        datamodule: a LightningDataModule, whose training loader and batch-transfer hooks are used; None: the trainer's.
        check_data: compare a few batches and losses with those of the fit before the first question, and refuse others.

    Raises:
        TypeError: data without indexed examples, such as an IterableDataset.
        ValueError: empty data, a dataset of another length than the one trained on, patterns that match nothing, or
            checkpoints of another module.
        MissingEvidence: the best or averaged weights were not recorded.

    Example:
        >>> attributor = Attributor(model, train=train_dataset, trajectory=trajectory)  # doctest: +SKIP
        >>> attributor.score(TracInCP(), queries=test_dataset).proponents(k=5)  # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913 - the contract's names
        self,
        module: Any,
        train: Any = None,
        trajectory: Trajectory | None = None,
        trainer: Any = None,
        batch_size: int | None = None,
        refit: Refit | None = None,
        loss: Loss | None = None,
        parameters: str | Sequence[str] | None = None,
        weights: str | PathLike[str] = "last",
        *,
        datamodule: Any = None,
        check_data: bool = True,
    ) -> None:
        self.module = unwrapped(module)
        trajectory = trajectory if trajectory is None else fitted_trajectory(trajectory, self.module)
        self.trajectory = trajectory
        self.trainer = trainer if trainer is not None else getattr(self.module, "_trainer", None)
        self.refit = refit
        self.loss = loss
        check_integer("batch_size", batch_size, optional=True)
        self.batch_size = batch_size
        check_flag("check_data", check_data)
        self._datamodule = datamodule_of(datamodule, self.module, self.trainer)
        self._train = training_source(train, self._datamodule)
        known = None if trajectory is None else trajectory.dataset_size
        if known not in (None, len(self._train.dataset)):
            raise ValueError(
                f"Expected `train` to have the {known} examples of the dataset that was trained on, got "
                f"{len(self._train.dataset)}. Pass that dataset (an un-augmented one of equal length is fine)."
            )
        make_layers(self.module, None if trajectory is None else trajectory.checkpoints[-1].tensors)
        names = selected_parameters(
            self.module, trajectory, (parameters,) if isinstance(parameters, str) else parameters
        )
        about = self.module, self._train, trajectory, self.trainer, loss, names, batch_size
        self._session = Session(*about, datamodule=datamodule, checks_data=check_data)
        self._final = final_weights(weights, self._session)
        if refit is not None:
            refit.attach(self._session, self._train)

    # ---- questions ------------------------------------------------------------------------------------------------

    def score(
        self,
        method: Method,
        queries: Any,
        top_k: int | None = None,
        measurement: Loss | None = None,
        higher_is_better: bool = False,
        aggregate: str | None = None,
        path: str | PathLike[str] | None = None,
    ) -> Scores:
        """Score every training example for every query.

        Args:
            method: how influence is estimated.
            queries: Dataset, DataLoader or ``"train"``; with a DataModule also ``"val"``, ``"test"`` or ``"val:1"``;
                their loss is that of ``training_step``, or ``loss=``.
            top_k: keep only the k strongest proponents and opponents of each query; None: the full matrix.
            measurement: ``(module, batch) -> [batch]``, scored instead of the query's loss.
            higher_is_better: whether a higher measurement is better; positive scores still mean *makes it better*.
            aggregate: ``"mean"``: score the mean over all queries, as one query.
            path: a file to save the scores in.

        Returns:
            ``Scores`` [query, train].

        Raises:
            MissingEvidence: the method needs what was not captured.
            ValueError: bad arguments, queries that the module does not accept, gradients that are not finite.
        """
        self._check(method)
        _check_arguments(top_k, aggregate, measurement, higher_is_better)
        source = self._queries(queries)
        with self._open(method, source, measurement, aggregate) as setting:
            all_queries = _queries_of(setting)
            dtype = setting.zeros().dtype
            ids = _scored(method, setting.n_train)
            accumulator: MatrixAccumulator | TopKAccumulator
            if top_k is None:
                accumulator = MatrixAccumulator(len(all_queries), len(ids), dtype)
            else:
                accumulator = TopKAccumulator(len(all_queries), top_k, dtype, ids)
            run_scores(method, setting, all_queries, accumulator, -1.0 if higher_is_better else 1.0, self.trainer)
        base = self._train.base_ids()
        record = self._record(method, setting) | {
            "train_ids": ids,
            "query_ids": torch.arange(len(all_queries)),
            "base": (None if base is None else base[ids], None if aggregate else source.base_ids()),
            "allow_nan": isinstance(method, Retraining),
        }
        scores = Scores(*accumulator.result(), **record)
        scores.at_hand = (self._train.dataset, None if aggregate else source.dataset)
        if path is not None:
            scores.save(path)
        return scores

    def self_influence(self, method: Method, path: str | PathLike[str] | None = None) -> SelfScores:
        """Score every training example with itself as the query; mislabelled, odd and memorised ones score highest.

        Args:
            method: how influence is estimated.
            path: a file to save the scores in.

        Raises:
            MissingEvidence: the method needs what was not captured.
            NotImplementedError: the method has no self-influence.
            ValueError: self-influence that is the same for all examples; gradients that are not finite.
        """
        self._check(method)
        with self._open(method) as setting:
            values = run_self_influence(method, setting, self.trainer)
        record = self._record(method, setting) | {"base": self._train.base_ids()}
        scores = SelfScores(torch.arange(len(values)), values, **record)
        scores.at_hand = (self._train.dataset, None)
        if path is not None:
            scores.save(path)
        return scores

    def group(self, method: Method, ids: Sequence[int], queries: Any) -> Tensor:
        """The joint influence of a group of training examples on each query, [query].

        By the method's own estimate for groups, if it has one; otherwise the sum of the scores.

        Args:
            method: how influence is estimated.
            ids: of the group.
            queries: Dataset, DataLoader or ``"train"``.

        Raises:
            TypeError: ids that are not whole numbers, such as a mask.
            ValueError: ids outside the training dataset, or without scores.
        """
        self._check(method)
        ids = whole_numbers(ids).tolist()
        if wrong := [i for i in ids if not 0 <= i < len(self._train.dataset)]:
            raise ValueError(f"Expected `ids` from 0 to {len(self._train.dataset) - 1}, got {wrong[:5]!r}.")
        scored = _scored(method, len(self._train.dataset))
        if unscored := sorted(set(ids) - set(scored.tolist())):
            raise ValueError(f"Expected `ids` that {method!r} has scores for, got {unscored[:5]!r}.")
        with self._open(method, self._queries(queries)) as setting:
            return run_group(method, setting, _queries_of(setting), list(ids), self.trainer)

    def losses(self, data: Any = "train") -> Tensor:
        """The loss of every example on its own at the final weights, [example]; a baseline for finding label errors."""
        source = self._queries(data)
        with self._final.end.open(gradients=False) as setting:
            setting.reduction_of(None)  # it finds out how an example is read alone
            examples, task = self._final.end.examples(source), setting.task
            with torch.no_grad():
                values = [float(task(task.to_device(examples.one(i))).sum()) for i in range(len(examples))]
        return torch.tensor(values, dtype=torch.float64)

    def cost(self, method: Method, queries: Any = None, aggregate: str | None = None) -> float:
        """Estimate the seconds that ``score`` takes, or, without queries, ``self_influence``.

        Models that methods have to retrain are not included.
        """
        self._check(method)
        source = None if queries is None else self._queries(queries)
        with self._open(method, source, aggregate=aggregate) as setting:
            return method.cost(setting, setting.queries).seconds

    def session(self, queries: Any = None) -> AbstractContextManager[Setting]:
        """A context manager that gives what a method works with, for your own computations with gradients.

        Its final weights are the last, whatever ``weights``.

        Args:
            queries: Dataset, DataLoader, ``"train"``, or None for training examples only.
        """
        return self._session.open(None if queries is None else self._queries(queries))

    def estimate(
        self, method: Retraining, queries: Any, measurement: Loss | None = None, higher_is_better: bool = False
    ) -> Estimate:
        """Scores of a method that retrains, [query, train], with their standard errors and numbers of models.

        After ``score`` this takes forward passes only, because the models are kept.

        Args:
            method: one that retrains, such as ``Downsampling()``.
            queries: Dataset, DataLoader or ``"train"``.
            measurement: as for ``score``.
            higher_is_better: as for ``score``.

        Raises:
            TypeError: a method that retrains no models.
            MissingEvidence: no ``refit``.
        """
        self._check(method)
        if not isinstance(method, Retraining):
            raise TypeError(f"Expected a method that retrains models, such as `Downsampling()`, got {method!r}.")
        _check_arguments(None, None, measurement, higher_is_better)
        with self._open(method, self._queries(queries), measurement) as setting:
            found = method.estimate(setting, _queries_of(setting))
        return replace(found, values=-found.values) if higher_is_better else found

    # ---- preparation ----------------------------------------------------------------------------------------------

    def _check(self, method: Method) -> None:
        """Raises before any work begins if the method needs what this attributor does not have."""
        if not isinstance(method, Method):
            raise TypeError(f"Expected `method` to be a Method such as `TracInCP()`, got {method!r}.")
        name = method.name
        if method.needs & Evidence.CHECKPOINTS and self.trajectory is None:
            raise MissingEvidence(
                f"`{name}` needs checkpoints with learning rates, got `trajectory=None`. Fit with "
                "`Trainer(callbacks=[Influence()])`, load files with `Trajectory.from_checkpoints(paths)`, or use "
                "`GradientDot()`, which needs only the final weights."
            )
        if method.needs & Evidence.TRACKER:
            trajectory = self.trajectory
            run, last = (None, 0) if trajectory is None else (trajectory.path, trajectory.checkpoints[-1].step)
            load_record(run, method.record, last)
        if method.needs & Evidence.REFIT and self.refit is None:
            raise MissingEvidence(
                f"`{name}` retrains models, got `refit=None`. Pass `Attributor(..., refit=Refit(...))`."
            )

    @contextlib.contextmanager
    def _open(
        self,
        method: Method,
        queries: Source | None = None,
        measurement: Loss | None = None,
        aggregate: str | None = None,
    ) -> Iterator[Setting]:
        """Opens the question with what the method needs: a plan of the gradients, retrained models."""
        gradients = not isinstance(method, ForwardOnly)
        with self._final.session_of(method).open(queries, measurement, aggregate == "mean", gradients) as setting:
            if self.refit is not None and method.needs & Evidence.REFIT:
                setting.models = self.refit.models
            if self.refit is not None and queries is not None:
                self.refit.asked = queries
            yield setting

    def _queries(self, queries: Any) -> Source:
        if queries == "train" and isinstance(queries, str):
            return self._train
        found = named_queries(queries, self._datamodule) if isinstance(queries, str) else queries
        return source_of(found, "queries", like=self._train)

    def _record(self, method: Method, setting: Setting) -> dict[str, Any]:
        checkpoints: list[int] = []
        notes = list(setting.notes)
        if not isinstance(method, ForwardOnly):
            notes.append(setting.engine.plan.summary(setting.engine.task.named_parameters()))
        if any(is_half(p) for p in self.module.parameters()):
            notes.append("Weights of 16 bits were scored in float32.")
        notes += self._final.notes_for(method)
        trajectory = setting.trajectory
        if trajectory is not None:
            checkpoints = [trajectory.checkpoints[i].step for i in method.positions(trajectory)]
            notes += trajectory.notes
        return {
            "method": method.name,
            "settings": method.hyperparameters(),
            "units": method.unit(setting),
            "notes": notes,
            "checkpoints": checkpoints,
            "diagnostics": setting.diagnostics,
        }


def _check_arguments(top_k: object, aggregate: object, measurement: object, higher_is_better: bool) -> None:
    check_integer("top_k", top_k, optional=True)
    if aggregate not in (None, "mean"):
        raise ValueError(f"Expected `aggregate` to be None or 'mean', got {aggregate!r}.")
    if higher_is_better and measurement is None:
        raise ValueError("Expected `measurement=` with `higher_is_better=True`, got None: lower is better for a loss.")


def _queries_of(setting: Setting) -> Queries:
    if setting.queries is None:
        raise ValueError("Expected `queries`, got None. Pass a Dataset, a DataLoader or 'train'.")
    return setting.queries


def _scored(method: Method, n_train: int) -> Tensor:
    """Ids of the training examples that a method has scores for, [scored] int64."""
    ids = method.scored(n_train)
    return torch.arange(n_train) if ids is None else torch.tensor(list(ids), dtype=torch.int64)
