"""Attributor: scores of a module's training examples by any method."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_influence.attribution import arguments
from lightning_influence.attribution.accumulators import accumulator_of
from lightning_influence.attribution.answers import Answers
from lightning_influence.attribution.asking_again import asking_again
from lightning_influence.attribution.data_arguments import datamodule_of, described, queried, training_source
from lightning_influence.attribution.driver import run_group, run_scores, run_self_influence, share_of
from lightning_influence.attribution.final_weights import final_weights
from lightning_influence.attribution.finished import Finished, kept
from lightning_influence.attribution.opening import opened
from lightning_influence.attribution.out_of_memory import in_memory
from lightning_influence.attribution.parameter_selection import selected_parameters
from lightning_influence.attribution.streams import check_method_on_stream, check_stream
from lightning_influence.data.lookup import stream_of
from lightning_influence.data.source import Source
from lightning_influence.hints import Hinted
from lightning_influence.methods.method import Cost, Method
from lightning_influence.methods.plain_loss import PlainLoss
from lightning_influence.methods.retraining import Estimate, Retraining
from lightning_influence.module.layers import make_layers
from lightning_influence.module.task import Loss, unwrapped
from lightning_influence.processes import Processes, processes_of
from lightning_influence.progress import telling
from lightning_influence.refit import Refit
from lightning_influence.scores import Scores, SelfScores
from lightning_influence.setting.session import Session
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import Work, seconds_of
from lightning_influence.trajectory import Trajectory, fitted_trajectory

_Answer = TypeVar("_Answer", Scores, SelfScores)


class Attributor(Hinted):
    """Computes the influence of the training examples on a module.

    Args:
        module: the LightningModule.
        train: the training DataLoader or Dataset, or one of the same examples without augmentation; None: that of the
            DataModule.
        trajectory: checkpoints and batch order of the fit; None: only the module's present weights are known.
        trainer: its accelerator, precision and data hooks are used; None: the module's own Trainer, if it has one.
            With one that has several processes, all of them ask each question and share its work, once its fit or
            (started by ``torchrun``) ``trainer.strategy.setup_environment()`` has connected them.
        batch_size: examples per block; None: the loader's batch size, or more if their gradients are small.
        refit: a ``Refit``, which says how to retrain models, for methods that need it.
        loss: ``(module, batch) -> [batch]`` per-sample losses; None: ``training_step``.
        parameters: ``fnmatch`` patterns of the names of parameters whose gradients are used; None: all that train.
        weights: what methods that need the final weights alone use: ``"last"``, after the last step; ``"best"``, of
            ``ModelCheckpoint``; ``"averaged"``, of Lightning's EMA and SWA; or the path of a ``.ckpt`` file, of which
            what ``load_from_checkpoint`` gives is read. Methods that follow the fit are not changed by it.
        lookup: ``id -> example``, for a fit on a stream (``IterableDataset``) with ``Influence(sample_id=)``: the
            training examples are those whose ids it recorded, read by this function, and scores have these ids.
        datamodule: a LightningDataModule, whose training loader and batch-transfer hooks are used; None: the trainer's.
        precision: in which the module is computed, as Lightning names it: ``"32-true"`` (without TF32), ``"64-true"``,
            ``"bf16-true"``, ``"16-mixed"`` or ``"bf16-mixed"``; None: in its weights' own type without autocast,
            float32 standing for 16 bits unless it runs in them only. Products are summed in float32 at least.
        check_data: compare a few batches and losses with those of the fit before each question, and refuse others.

    Attributes:
        limit_seconds: solvers (``ConjugateGradient``, ``LiSSA``) stop this long after a question was asked, with what
            they have found; None: when they are done.

    Raises:
        TypeError: data without indexed examples, such as an IterableDataset.
        ValueError: empty data or of another length than in the fit, no matching names, checkpoints of another module.
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
        lookup: Callable[[int], Any] | None = None,
        datamodule: Any = None,
        check_data: bool = True,
        precision: str | None = None,
    ) -> None:
        arguments.check_parts(module, trajectory, trainer, refit, loss, lookup)
        arguments.check_options(batch_size, check_data, precision)
        self._stream = None if lookup is None else stream_of(train, lookup, trajectory)
        if self._stream is not None:
            check_stream(refit)
            train, trajectory = self._stream.source, self._stream.trajectory
        self.module = unwrapped(module)
        trajectory = trajectory if trajectory is None else fitted_trajectory(trajectory, self.module)
        self.trajectory = trajectory
        self.trainer = trainer if trainer is not None else getattr(self.module, "_trainer", None)
        self.processes = processes_of(trainer)
        self._refit, self.loss, self.precision = refit, loss, precision
        self.limit_seconds: float | None = None
        self.batch_size = batch_size
        self._datamodule = datamodule_of(datamodule, self.module, self.trainer)
        self._train = training_source(train, self._datamodule, trajectory)
        make_layers(self.module, None if trajectory is None else trajectory.checkpoints[-1].tensors)
        names = selected_parameters(self.module, trajectory, parameters)
        about = self.module, self._train, trajectory, self.trainer, loss, names, batch_size
        self._session = Session(*about, datamodule=datamodule, checks_data=check_data, precision=precision)
        self._final = final_weights(weights, self._session)
        if refit is not None:
            self.refit = refit
            refit.attach(self._session, self._train, self.processes)

    def __repr__(self) -> str:
        return described(self.module, self._train, self.trajectory)

    # ---- questions ------------------------------------------------------------------------------------------------

    @asking_again
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
            ValueError: bad arguments, queries that the module does not accept, gradients that are not finite. Scores
                that were finished before an error are its attribute ``scores``.
        """
        self._check(method, path)
        arguments.check_arguments(top_k, aggregate, measurement, higher_is_better)
        source = self._queries(queries)
        with self._open(method, source, measurement, aggregate) as setting:
            all_queries = arguments.queries_of(setting)
            dtype = setting.zeros().dtype
            ids, rows = arguments.scored_ids(method, setting.n_train), torch.arange(len(all_queries))
            finished = Finished(sign=-1.0 if higher_is_better else 1.0)
            queried = source if aggregate is None else None
            answers = Answers(method, setting, self._final, self._train, self._stream, queried)
            accumulator = accumulator_of(top_k, len(all_queries), ids, dtype)
            with kept(lambda said: answers.finished_scores(accumulator, finished, ids, said), self.processes):
                run_scores(method, setting, all_queries, accumulator, self.trainer, finished)
        return self._saved(answers.scores(accumulator.result(), ids, rows), path)

    @asking_again
    def self_influence(self, method: Method, path: str | PathLike[str] | None = None) -> SelfScores:
        """Score every training example with itself as the query; mislabelled, odd and memorised ones score highest.

        Args:
            method: how influence is estimated.
            path: a file to save the scores in.

        Returns:
            ``SelfScores`` [train].

        Raises:
            MissingEvidence: the method needs what was not captured.
            NotImplementedError: the method has no self-influence.
            ValueError: self-influence that is the same for all examples; gradients that are not finite. Values that
                were finished before an error are its attribute ``scores``.
        """
        self._check(method, path)
        with self._open(method) as setting:
            answers, finished = Answers(method, setting, self._final, self._train, self._stream), Finished()
            ids = arguments.scored_ids(method, setting.n_train)
            with kept(lambda said: answers.finished_self_scores(finished, ids, said), self.processes):
                values = run_self_influence(method, setting, self.trainer, finished)
        return self._saved(answers.self_scores(values, ids), path)

    @asking_again
    def group(self, method: Method, ids: Sequence[int], queries: Any) -> Tensor:
        """The joint influence of a group of training examples on each query, [query].

        By the method's own estimate for groups, if it has one; otherwise the sum of the scores.

        Args:
            method: how influence is estimated.
            ids: of the group.
            queries: Dataset, DataLoader or ``"train"``.

        Returns:
            [query], in the units of the method's scores.

        Raises:
            MissingEvidence: the method needs what was not captured.
            TypeError: ids that are not whole numbers, such as a mask.
            ValueError: ids outside the training dataset, or without scores.
        """
        self._check(method)
        ids = arguments.group_of(method, ids, len(self._train.dataset), self._stream)
        with self._open(method, self._queries(queries)) as setting:
            return run_group(method, setting, arguments.queries_of(setting), ids, self.trainer)

    @asking_again
    def losses(
        self,
        data: Any = "train",
        checkpoints: Sequence[int] | str | None = None,
        path: str | PathLike[str] | None = None,
    ) -> SelfScores:
        """Rank examples by their own loss in eval mode, highest first: the plainest list of labels to check.

        Args:
            data: ``"train"``, a Dataset or DataLoader; with a DataModule also ``"val"`` or ``"test"``.
            checkpoints: positions of the checkpoints whose losses are averaged; ``"all"``: all but the initial weights,
                which ranks better where the fit memorised its data; None: the final weights alone.
            path: a file to save the losses in.

        Returns:
            ``SelfScores`` [example], in the units of the loss.

        Raises:
            ValueError: losses that are not finite.
            MissingEvidence: ``checkpoints`` without a trajectory.
        """
        method, source = PlainLoss(checkpoints), self._queries(data, "data")
        arguments.check_method(method, self.trajectory, self._refit, path)
        train = source is self._train
        with self._final.session_of(method).open(gradients=False) as setting:
            setting.reduction_of(None)  # it finds out how an example is read alone
            examples = setting.examples if train else self._session.examples(source)
            asked = replace(setting, examples=examples, ids=range(len(examples)))
            values = run_self_influence(method, asked, self.trainer, Finished())
            answers = Answers(method, asked, self._final, source, self._stream if train else None)
            return self._saved(answers.self_scores(values, torch.arange(len(values))), path)

    def cost(self, method: Method, queries: Any = None, aggregate: str | None = None) -> float:
        """Estimate the seconds that ``score`` takes, or, without queries, ``self_influence``.

        Pieces of the work are timed and counted, which takes ten passes of a block of training examples and of queries;
        60 products of 64 examples with solvers, and a dozen steps of a replayed fit. Nothing is changed by it.

        Args:
            method: how influence is estimated.
            queries: as for ``score``; None: the cost of ``self_influence``.
            aggregate: as for ``score``.

        Raises:
            MissingEvidence: the method needs what was not captured.
            ValueError: queries that the module does not accept.
        """
        return self._cost(method, queries, aggregate).seconds

    @asking_again
    def _cost(self, method: Method, queries: Any = None, aggregate: str | None = None) -> Cost:
        """The estimate with what it is made of."""
        self._check(method)
        source = None if queries is None else self._queries(queries)
        with self._open(method, source, aggregate=aggregate) as setting:
            n = 1 if setting.queries is None else len(setting.queries)
            fraction = share_of(method, setting, n).fraction
            alone = setting.processes = Processes()  # each times its own pieces
            with telling(self.trainer, f"{method.name}: estimating how long it will take"):
                cost = in_memory(lambda: method.cost(setting, setting.queries), setting, alone)
        with contextlib.ExitStack() as again:  # the first time also looks at the loss and the gradients, only once
            opening = seconds_of(lambda: again.enter_context(self._open(method, source, aggregate=aggregate)))
        return cost.of_share(fraction, Work("opening", 1, opening))

    def session(self, queries: Any = None) -> contextlib.AbstractContextManager[Setting]:
        """A context manager that gives what a method works with, for your own computations with gradients.

        Its final weights are the last, whatever ``weights``.

        Args:
            queries: Dataset, DataLoader, ``"train"``, or None for training examples only.
        """
        return self._session.open(None if queries is None else self._queries(queries))

    @asking_again
    def estimate(
        self, method: Retraining, queries: Any, measurement: Loss | None = None, higher_is_better: bool = False
    ) -> Estimate:
        """Scores of a method that retrains, [query, train], with their standard errors and numbers of models.

        After ``score`` this takes forward passes only.

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
        arguments.check_arguments(None, None, measurement, higher_is_better)
        with self._open(method, self._queries(queries), measurement) as setting:
            found = method.estimate(setting, arguments.queries_of(setting))
        return replace(found, values=-found.values) if higher_is_better else found

    # ---- preparation ----------------------------------------------------------------------------------------------

    def _check(self, method: Method, path: str | PathLike[str] | None = None) -> None:
        if self._stream is not None and isinstance(method, Method):
            check_method_on_stream(method, len(self._train.dataset))
        arguments.check_method(method, self.trajectory, self._refit, path)

    def _open(
        self,
        method: Method,
        queries: Source | None = None,
        measurement: Loss | None = None,
        aggregate: str | None = None,
    ) -> contextlib.AbstractContextManager[Setting]:
        session, mean = self._final.session_of(method), aggregate == "mean"
        return opened(session, method, queries, measurement, mean, self._refit, self.processes, self.limit_seconds)

    def _saved(self, scores: _Answer, path: str | PathLike[str] | None) -> _Answer:
        if path is not None and self.processes.rank == 0:
            scores.save(path)
        return scores

    def _queries(self, queries: Any, name: str = "queries") -> Source:
        return queried(queries, self._train, self._datamodule, name)
