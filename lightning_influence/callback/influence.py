"""`Influence`: the callback that users add to their Trainer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lightning_influence.attribution.attributor import Attributor
from lightning_influence.callback.arguments import checked_queries, named_methods, patterns_of, schedule_of
from lightning_influence.callback.confirmation import confirm_data
from lightning_influence.callback.during_fit import DuringFit
from lightning_influence.callback.end_of_fit import EndOfFit, Results, check_queries
from lightning_influence.callback.offline import offline_lines
from lightning_influence.callback.plan import ScoringPlan
from lightning_influence.capture.identity import LoaderTap
from lightning_influence.capture.places import check_strategy, check_training_step, on_rank_zero, writable_dirpath
from lightning_influence.capture.recorder import Recorder, resume_point
from lightning_influence.capture.store import RunWriter, claim_run
from lightning_influence.checks import check_callable, check_flag, check_integer, check_positive
from lightning_influence.compat import CallbackBase, rank_zero_warn
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.run import parent_run
from lightning_influence.types import MissingEvidence

# attributes that hold the model or open files
_NOT_PICKLED = ("log", "log_dict", "_trainer", "_module", "_recorder", "_tap", "_during")


class Influence(CallbackBase):
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
        top_k: Keep only the k strongest proponents and opponents of each query. None: keep all scores.
        self_influence: Also score each training example on itself.
        parameters: Patterns (fnmatch) over `named_parameters()`. None: all parameters that are trained.
        loss: Per-sample losses, `loss(module, batch) -> [batch]`. None: the loss of `training_step`.
        sample_id: Key of the batch, or function of the batch, that gives one unique integer per example. Needed where
            no sampler provides indices, as for an `IterableDataset`.
        max_cost: Do not start a method whose estimated time exceeds this many times the duration of the fit, nor a
            fit in which tracking would take this many times as long as plain training.
        log_scores: Write scores to the Trainer's loggers.

    Attributes:
        scores: `Scores` by name of the method, once the fit has ended.
        self_scores: `SelfScores` by name of the method, with `self_influence=True`.
        run_dir: Folder of the newest fit.

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
        max_cost: float = 10.0,
        log_scores: bool = True,
    ) -> None:
        super().__init__()
        self.methods = named_methods(methods)
        for name, method in self.methods.items():
            if method.needs & Evidence.REFIT:
                raise ValueError(
                    f"Expected `methods` that can run when a fit ends, got {name!r}, which retrains models. "
                    "Run it afterwards: `Attributor(model, train=train_dataset, trajectory=influence.trajectory, "
                    f"refit=Refit()).score({type(method).__name__}(...), queries=...)`."
                )
        check_integer("top_k", top_k, optional=True)
        check_flag("self_influence", self_influence)
        check_callable("loss", loss)
        if not isinstance(sample_id, str):
            check_callable("sample_id", sample_id)
        check_positive("max_cost", max_cost)
        check_flag("log_scores", log_scores)
        self.queries = checked_queries(queries)
        self.dirpath = None if dirpath is None else fspath(dirpath)
        self._schedule = schedule_of(every_n_epochs, every_n_train_steps)
        self.top_k, self.self_influence = top_k, self_influence
        self.parameters = patterns_of(parameters)
        self.loss, self.sample_id = loss, sample_id
        self.max_cost, self.log_scores = float(max_cost), log_scores
        self.scores = Results()
        self.self_scores = Results()
        self.run_dir: Path | None = None
        self._resolved: Path | None = None
        self._restored: dict[str, Any] = {}
        self._trainer: Any = None
        self._module: Any = None
        self._tap: LoaderTap | None = None
        self._recorder: Recorder | None = None
        self._during: DuringFit | None = None

    # ---- results ----

    @property
    def trajectory(self) -> Trajectory:
        """What the newest fit has written to disk so far.

        Raises:
            MissingEvidence: no fit has been recorded yet.
        """
        if self.run_dir is None:
            raise MissingEvidence(
                "Expected a fit with this callback, got none yet (`fast_dev_run` records nothing). Call `trainer.fit`,"
                " or load an earlier fit with `Trajectory.load(dirpath)`."
            )
        if self._recorder is not None:
            self._recorder.flush()
        return Trajectory.load(self.run_dir)

    @property
    def attributor(self) -> Attributor:
        """Computes further scores from the newest fit.

        Raises:
            MissingEvidence: no fit has been recorded yet.
        """
        return self._plan.attributor(self._module, self._trainer, self.trajectory)

    def _score_at_end(self, trainer: Any, module: Any) -> None:
        """Run the methods on what was recorded."""
        if not self.methods or self.run_dir is None:
            return
        if trainer.world_size > 1:
            rank_zero_warn(
                f"Expected one process to run `methods` in, got {trainer.world_size}. The fit is recorded. "
                f"Compute scores afterwards in a single process:\n{offline_lines(self.run_dir, self._plan, trainer)}"
            )
            return
        try:
            attributor, seconds = self.attributor, self.trajectory.fit_seconds or 0.0
        except Exception as error:
            rank_zero_warn(f"Scores were not computed, the fit is complete: {type(error).__name__}: {error}")
            self.scores.reasons |= {name: str(error) for name in self.methods}
            return
        EndOfFit(self._plan, trainer, attributor, self.run_dir, seconds, self.scores, self.self_scores).run()

    @property
    def _plan(self) -> ScoringPlan:
        return ScoringPlan(**{field.name: getattr(self, field.name) for field in fields(ScoringPlan)})

    # ---- hooks ----

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start watching the data loaders: later hooks may come after their iterators were created."""
        if stage != "fit":
            return
        self._unwire(trainer)
        self.scores.clear()
        self.self_scores.clear()
        self.run_dir, self._restored = None, {}
        if trainer.fast_dev_run:
            return
        check_strategy(trainer.strategy, self.dirpath)
        check_training_step(pl_module)
        self._resolved = writable_dirpath(trainer, self.dirpath)
        check_queries(self.queries)
        self._trainer, self._module = trainer, pl_module
        self._tap = LoaderTap.acquire(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Create the folder of the run and save the initial checkpoint."""
        resolved = self._resolved
        if self._tap is None or resolved is None:
            return
        parent, made = resume_point(self._restored, trainer)
        claimed = on_rank_zero(trainer, lambda: str(claim_run(resolved)), f"to create a folder in `{resolved}`")
        self.run_dir = Path(claimed)
        folder = self.run_dir if trainer.is_global_zero else self.run_dir / f"steps-rank{trainer.global_rank}"
        store = RunWriter(folder, trainer.world_size, parent)
        self._recorder = Recorder(trainer, pl_module, self._tap, store, self._schedule, self.sample_id, made)
        self._recorder.starts()
        self._during = DuringFit(self._plan, trainer, pl_module, self.run_dir)
        if self._during.loop.tracked:
            self._recorder.steps.follower = self._during.loop.stepped
        self._during.starts(None if parent is None else parent_run(self.run_dir, vars(parent)), made)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Notice loaders that were reloaded and optimizers that were replaced."""
        if self._recorder is not None:
            self._recorder.epoch_starts()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record which examples are in the batch, and show it to the trackers."""
        if self._recorder is not None and self._during is not None:
            recorded = self._recorder.batch_starts(batch)
            self._during.batch_starts(recorded, recorded.ids, batch)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """An accumulation window begins."""
        if self._recorder is not None:
            self._recorder.steps.windows.before_zero_grad(optimizer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The batch has a loss; in manual optimization, an accumulation window may begin."""
        if self._recorder is not None:
            self._recorder.before_backward()
            self._recorder.steps.windows.before_backward()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The optimizer is about to step."""
        if self._recorder is not None and self._during is not None:
            self._recorder.steps.before_step(optimizer)
            self._during.loop.before_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Complete the record of the batch, and save a checkpoint if one is due."""
        if self._recorder is not None:
            self._recorder.batch_ended(batch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save a checkpoint if one is due."""
        if self._recorder is not None:
            self._recorder.epoch_ended()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the final checkpoint, then run the methods."""
        if self._recorder is None or self._during is None or self.run_dir is None:
            return
        self._recorder.ended()
        confirm_data(self._recorder, trainer, pl_module, self.run_dir)
        self._during.save(self._recorder.made)
        self.scores.reasons |= self._during.lost
        self._stop()
        self._score_at_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what was recorded and remove all hooks; Lightning calls no `teardown` after an error."""
        if self._recorder is not None:
            self._recorder.interrupted()
        self._unwire(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove all hooks."""
        if stage == "fit":
            self._unwire(trainer)

    # ---- state ----

    @property
    def state_key(self) -> str:
        """Distinguishes several of these callbacks in one Trainer."""
        return self._generate_state_key(
            dirpath=self.dirpath,
            methods=sorted(self.methods),
            every_n_epochs=self._schedule.every_n_epochs,
            every_n_train_steps=self._schedule.every_n_train_steps,
            parameters=self.parameters,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where a resumed fit finds this run: builtins only, so that checkpoints load with `weights_only=True`."""
        if self._recorder is None or self.run_dir is None:
            return {}
        self._recorder.flush()  # a fit that resumes from this checkpoint needs every step before it
        if self._during is not None:
            self._during.save(self._recorder.made)
        if self._recorder.failed:
            return {}
        link = {"run": self.run_dir.name, "path": str(self.run_dir), "step": self._recorder.made}
        return link | {"id": self._recorder.manifest["id"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the link to the run that is resumed."""
        self._restored = dict(state_dict)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Accept the state of an `Influence` with other arguments, such as one more method."""
        states = checkpoint.get("callbacks", {})
        own = [state for key, state in states.items() if str(key).startswith(type(self).__qualname__ + "{")]
        if self.state_key not in states and len(own) == 1:
            self._restored = dict(own[0])

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return state | {name: None for name in _NOT_PICKLED if name in state}

    def _stop(self) -> None:
        for part in (self._during, self._recorder):
            if part is not None:
                part.close()
        self._during = self._recorder = None

    def _unwire(self, trainer: Any) -> None:
        self._stop()
        if self._tap is not None:
            self._tap.release(trainer)
            self._tap = None
