"""`Influence`: the callback that users add to their Trainer."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_influence.attribution.attributor import Attributor
from lightning_influence.callback import arguments
from lightning_influence.callback.confirmation import confirm_data
from lightning_influence.callback.during_fit import DuringFit
from lightning_influence.callback.end_of_fit import did_not_finish, score_at_end
from lightning_influence.callback.guest import Guest, guarded
from lightning_influence.callback.plan import LEAST_SECONDS, ScoringPlan
from lightning_influence.callback.queries import check_queries
from lightning_influence.capture.identity import LoaderTap
from lightning_influence.capture.places import (
    check_dirpath,
    check_strategy,
    check_training_step,
    on_rank_zero,
    writable_dirpath,
)
from lightning_influence.capture.recorder import Recorder
from lightning_influence.capture.store import RunWriter, claim_run, resume_point
from lightning_influence.checks import check_callable, check_integer, check_positive
from lightning_influence.compat import rank_zero_info
from lightning_influence.methods.method import Method
from lightning_influence.module.precision import check_precision
from lightning_influence.processes import processes_of
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.run import parent_run
from lightning_influence.types import MissingEvidence


class Influence(Guest):
    """Record what a fit does with each training example, and estimate their influence when it ends.

    Add it to the callbacks of a `Trainer`; the LightningModule stays unchanged. The fit itself is unaffected: weights,
    random state, data loaders and everything logged are identical to those without the callback.

    Args:
        methods: Methods to run when the fit ends: a list (scores are keyed by class name) or a dict of names and
            methods. Empty: only record.
        queries: Data to explain: a `Dataset`, a `DataLoader`, or "train", "val" or "test" for the Trainer's loader
            ("val:1" for the second of several). None: compute scores later with `attributor`.
        dirpath: Folder to write to; each fit creates a `run-N` inside it. None: next to the logger's run.
        every_n_epochs: Save a checkpoint every n epochs; 0 disables it. Initial and final weights are always saved.
        every_n_train_steps: Save a checkpoint every n optimizer steps instead.
        keep_last: Keep the newest n of these checkpoints and the initial one, and remove older ones of this fit while
            it runs. What sums over checkpoints then counts the steps of those kept only. None: keep all.
        keep: "all": every checkpoint holds the optimizer's state. "needed": only the first and those of the last epoch
            do, and under Adam others take a third of the space, unless `methods` has `SOURCE`, which reads them all.
        top_k: Keep only the k strongest proponents and opponents of each query. None: keep all scores.
        self_influence: Also score each training example on itself.
        parameters: Patterns (fnmatch) over `named_parameters()`. None: all parameters that are trained.
        loss: Per-sample losses, `loss(module, batch) -> [batch]`. None: the loss of `training_step`.
        sample_id: Key of the batch, or function of the batch, that gives one unique integer per example. Needed where
            no sampler provides indices, as for an `IterableDataset`.
        lookup: Function that returns the training example of such an integer, as the loader collates it, for data that
            cannot be read by index again.
        max_cost: Do not start a method whose estimated time exceeds this many times the duration of the fit, nor a
            fit in which tracking would take this many times as long as plain training. None: 10, and what takes less
            than a minute at the end of a fit is always started.
        album: Keep in the files of scores what the strongest examples look like and their predictions, up to 5 MB each
            of your data, for the pages of `report`. A dict: arguments of `Scores.save`, as `{"labels": class_names}`.
        log_scores: Write scores to the Trainer's loggers.
        labels: Also rank the training examples by how suspect their labels are, as `self_scores["labels"]`: by the mean
            of their losses over the checkpoints, a forward pass for each. Of the lists compared on labels of people it
            was as good as any after a short fit, and the best where a fit had learned its labels by heart.
        verbose: Say when the fit has ended what was scored, how long it took and where it is; False: only warn.
        precision: Precision of the scoring, see `Attributor`. None: that of the weights, whatever the fit's.

    Attributes:
        scores: `Scores` by name of the method, once the fit has ended; read from its files after `ddp_spawn`.
        self_scores: `SelfScores` by name of the method, with `self_influence=True`; "labels" with `labels=True`.
        run_dir: Folder of the newest fit.

    Raises:
        TypeError: an argument of another kind, such as the class of a method in place of a method.
        ValueError: a number out of range; a method that retrains models, or two of one class in a list; another name of
            a loader; another word for a precision.

    Example:
        >>> influence = Influence([TracInCP()], queries="val")  # doctest: +SKIP
        >>> Trainer(max_epochs=5, callbacks=[influence]).fit(model, datamodule)  # doctest: +SKIP
        >>> influence.scores["TracInCP"].proponents(k=5)  # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the contract's names
        self,
        methods: Sequence[Method] | Mapping[str, Method] = (),
        queries: Any = None,
        dirpath: str | PathLike[str] | None = None,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        top_k: int | None = None,
        self_influence: bool = False,
        parameters: str | Sequence[str] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        sample_id: str | Callable[[Any], Any] | None = None,
        max_cost: float | None = None,
        log_scores: bool = True,
        keep_last: int | None = None,
        lookup: Callable[[int], Any] | None = None,
        verbose: bool = True,
        precision: str | None = None,
        labels: bool = False,
        album: bool | Mapping[str, Any] = False,
        keep: str = "all",
    ) -> None:
        super().__init__()
        arguments.check_flags(labels=labels, self_influence=self_influence, log_scores=log_scores, verbose=verbose)
        self.album = arguments.album_options(album)
        self.methods, self.labels = arguments.methods_of_a_fit(methods, labels), labels
        check_integer("top_k", top_k, optional=True)
        check_callable("loss", loss)
        if not isinstance(sample_id, str):
            check_callable("sample_id", sample_id)
        check_callable("lookup", lookup)
        check_positive("max_cost", 10.0 if max_cost is None else max_cost)
        check_precision(precision)
        self.queries = arguments.checked_queries(queries)
        self.dirpath = arguments.checked_dirpath(dirpath)
        self._schedule = arguments.schedule_of(every_n_epochs, every_n_train_steps, keep_last, keep, self.methods)
        self.top_k, self.self_influence, self.parameters = top_k, self_influence, arguments.patterns_of(parameters)
        self.loss, self.sample_id, self.lookup, self.precision = loss, sample_id, lookup, precision
        self.max_cost, self.least_seconds = (10.0, LEAST_SECONDS) if max_cost is None else (float(max_cost), 0.0)
        self.log_scores, self.verbose = log_scores, verbose
        self._resolved: Path | None = None
        self._key: str | None = None

    def __repr__(self) -> str:
        where = "no fit yet" if self.run_dir is None else f"newest fit in {str(self.run_dir)!r}"
        return f"Influence({', '.join(self._plan.names) or 'records only'}; {where})"

    # ---- results ----

    @property
    def trajectory(self) -> Trajectory:
        """What the newest fit has written to disk so far.

        Raises:
            MissingEvidence: no fit has been recorded yet.
        """
        if self.run_dir is None:
            got = f"one that was not recorded. {self.scores.why}" if self.scores.why else "none yet."
            raise MissingEvidence(
                f"Expected a fit with this callback, got {got} Call `trainer.fit` (`fast_dev_run` records nothing), or"
                " load an earlier fit with `Trajectory.load(dirpath)`."
            )
        if self._recorder is not None:
            self._recorder.flush()
        return Trajectory.load(self.run_dir)

    @property
    def attributor(self) -> Attributor:
        """Computes further scores from the newest fit; from its last weights alone where the disk was full.

        Raises:
            MissingEvidence: no fit has been recorded yet, or this is a copy of the callback that recorded it.
        """
        found = self.trajectory if self._last is None else self._last
        if self._trainer is None or self._module is None:
            raise MissingEvidence(
                "Expected the callback in a process of its fit, got a copy of it, which holds neither the module nor "
                "the Trainer. Make one: `Attributor(model, train=train_dataloader, trajectory=influence.trajectory)`."
            )
        return self._plan.attributor(self._module, self._trainer, found)

    @property
    def _plan(self) -> ScoringPlan:
        return ScoringPlan(**{field.name: getattr(self, field.name) for field in fields(ScoringPlan)})

    # ---- hooks ----

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start watching the data loaders: later hooks may come after their iterators were created.

        Results of an earlier fit are kept until this one trains: a Trainer that only tunes changes nothing.

        Raises:
            MisconfigurationException: `dirpath` is no local folder; before the first step.
            ValueError: `queries` are empty.
            TypeError: `queries` are no data that can be scored.
        """
        if stage == "fit" and not trainer.fast_dev_run:
            check_dirpath(self.dirpath)
            check_queries(self.queries)
        if stage == "fit":
            self._set_up(trainer, pl_module)

    @guarded
    def _set_up(self, trainer: Any, pl_module: Any) -> None:
        self._unwire()
        self._phase, self._restored = "set up", {}
        if trainer.fast_dev_run:
            return
        check_strategy(trainer.strategy, self.dirpath)
        check_training_step(pl_module)
        self._resolved = writable_dirpath(trainer, self.dirpath)
        self._tap = LoaderTap.acquire(trainer)

    @guarded
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Create the folder of the run and save the initial checkpoint."""
        self._check_present()
        resolved = self._resolved
        if self._tap is None or resolved is None:
            return
        self._forget()
        self._phase = "training"
        self._trainer, self._module = trainer, pl_module
        parent, made = resume_point(self._restored, trainer)
        claimed = on_rank_zero(trainer, lambda: str(claim_run(resolved)), f"to create a folder in `{resolved}`")
        self.run_dir = Path(claimed)
        folder = self.run_dir if trainer.is_global_zero else self.run_dir / f"steps-rank{trainer.global_rank}"
        store = RunWriter(folder, trainer.world_size, parent, self._schedule.keep_last, self._token)
        self._recorder = Recorder(
            trainer, pl_module, self._tap, store, self._schedule, self.sample_id, made, self.run_dir
        )
        self._recorder.starts(self.verbose)
        self._during = DuringFit(self._plan, trainer, pl_module, self.run_dir)
        if self._during.loop.tracked:
            self._recorder.steps.follower = self._during.loop.stepped
        self._during.starts(None if parent is None else parent_run(self.run_dir, vars(parent)), made)

    @guarded
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Notice loaders that were reloaded and optimizers that were replaced."""
        if self._recorder is not None:
            self._recorder.epoch_starts()

    @guarded
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record which examples are in the batch, and show it to the trackers."""
        if self._recorder is not None and self._during is not None:
            recorded = self._recorder.batch_starts(batch, batch_idx)
            self._during.batch_starts(recorded, recorded.ids, batch, batch_idx)

    @guarded
    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """An accumulation window begins."""
        if self._recorder is not None:
            self._recorder.steps.windows.before_zero_grad(optimizer)

    @guarded
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The batch has a loss; in manual optimization, an accumulation window may begin."""
        if self._recorder is not None:
            self._recorder.before_backward()

    @guarded
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The optimizer is about to step."""
        if self._recorder is not None and self._during is not None:
            self._recorder.steps.before_step(optimizer)
            self._during.loop.before_step()

    @guarded
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Complete the record of the batch, and save a checkpoint if one is due."""
        if self._recorder is not None:
            self._recorder.batch_ended(batch)

    @guarded
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save a checkpoint if one is due."""
        if self._recorder is not None:
            self._recorder.epoch_ended()

    @guarded
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the final checkpoint, then run the methods in all processes."""
        self._check_present()
        began, processes = time.perf_counter(), processes_of(trainer)
        with processes.together():  # after it, each can read what the others have recorded
            recorded = self._end_record(trainer, pl_module)
            everywhere = all(processes.gathered(recorded and self._last is None))
        if self._plan.names and processes.count > 1 and not everywhere:
            self.scores.why = self.self_scores.why = "the fit was not recorded in every process"
        elif recorded and self._plan.names and self.run_dir is not None:
            results = self.scores, self.self_scores
            score_at_end(self._plan, trainer, self.run_dir, lambda: self.attributor, *results, began)

    def _end_record(self, trainer: Any, pl_module: Any) -> bool:
        """Complete the record; whether there is one in this process."""
        if self._recorder is None or self._during is None or self.run_dir is None:
            return False
        self._recorder.ended()
        if self._recorder.broken_off is None:
            confirm_data(self._recorder, trainer, pl_module, self.run_dir)
            self._during.save(self._recorder.made)
        else:
            self._last = self._recorder.in_memory()
        self.scores.reasons |= self._during.lost
        self._link = self.state_dict()
        self._stop()
        return True

    @guarded
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what was recorded and remove all hooks; Lightning calls no `teardown` after an error."""
        if self._recorder is not None and self.run_dir is not None:
            self._recorder.interrupted()
            self._link = self.state_dict()
            why = did_not_finish(exception, self.run_dir, self._plan, trainer)
            for results in (self.scores, self.self_scores):
                results.why = why
            if isinstance(exception, KeyboardInterrupt) and self._plan.verbose:
                rank_zero_info(f"Influence: {why}\nRecorded in {str(self.run_dir)!r}.")
        self._unwire()

    @guarded
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove all hooks."""
        if stage == "fit":
            self._unwire()

    # ---- state ----

    @property
    def state_key(self) -> str:
        """Distinguishes several of these callbacks in one Trainer."""
        if self._key is None or self._recorder is None:  # Lightning reads it at every hook
            self._key = self._generate_state_key(
                dirpath=self.dirpath,
                methods=sorted(self.methods),
                every_n_epochs=self._schedule.every_n_epochs,
                every_n_train_steps=self._schedule.every_n_train_steps,
                parameters=self.parameters,
            )
        return self._key
