"""`Influence`: the one callback."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lightning_influence.attribution.attributor import Attributor
from lightning_influence.callback.arguments import checked_queries, named_methods, patterns_of, schedule_of
from lightning_influence.callback.during_fit import DuringFit
from lightning_influence.callback.end_of_fit import EndOfFit, Results, check_queries, offline_lines
from lightning_influence.callback.plan import ScoringPlan
from lightning_influence.capture.identity import LoaderTap
from lightning_influence.capture.places import check_strategy, check_training_step, check_writable, resolve_dirpath
from lightning_influence.capture.recorder import Recorder, folder_for_rank, resume_point
from lightning_influence.capture.store import RunWriter, claim_run
from lightning_influence.checks import check_callable, check_flag, check_integer, check_positive
from lightning_influence.compat import CallbackBase, MisconfigurationException, rank_zero_warn
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.run import parent_run
from lightning_influence.types import MissingEvidence

# Lightning hangs bound methods of the module on every callback
_NOT_PICKLED = ("log", "log_dict", "_trainer", "_module", "_recorder", "_tap", "_during")


class Influence(CallbackBase):
    """Records what a fit did with each training example, and scores their influence when it ends.

    Training is not changed by it: weights, random state, loaders and `self.log` are those of a fit without it.

    Args:
        methods: What to run when the fit ends; none only captures. A list (a score's key is the class name) or a dict.
        queries: A `Dataset`, a `DataLoader`, or "train", "val", "test" for the Trainer's loader ("val:1": the
            second of several).
        dirpath: Where to write; by default beside the logger's run. Each fit makes its own `run-N` in it.
        every_n_epochs: Write a checkpoint after every so many epochs; 0 for never. Initial and final ones are
            always written.
        every_n_train_steps: Write one after every so many optimizer steps instead.
        top_k: Keep only the so many strongest proponents and opponents of a query; None keeps all.
        self_influence: Also score every training example on itself.
        parameters: Patterns (fnmatch) over `named_parameters()`; None takes all that train.
        loss: Per-sample losses, as `loss(module, batch) -> [batch]`; None takes `training_step`.
        sample_id: Key of the batch, or function of it, with unique integers, where no sampler gives them.
        max_cost: What runs at the end of the fit may cost at most so many times the fit itself.
        log_scores: Write scores to the Trainer's loggers.
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
                    f"Expected `methods` that run when a fit ends, got {name!r}, which trains models again. "
                    f"Ask for it afterwards: `influence.attributor.score({name}(...), queries=...)`."
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

    # ---- what the user reads ----

    @property
    def trajectory(self) -> Trajectory:
        """What the newest fit has left on disk so far.

        Raises:
            MissingEvidence: no fit was recorded yet.
        """
        if self.run_dir is None:
            raise MissingEvidence(
                "Expected a fit with this callback, got none yet (`fast_dev_run` records nothing). Call `trainer.fit`,"
                " or read an earlier one with `Trajectory.load(dirpath)`."
            )
        if self._recorder is not None:
            self._recorder.flush()
        return Trajectory.load(self.run_dir)

    @property
    def attributor(self) -> Attributor:
        """Asks further questions about the fit that was captured.

        Raises:
            MissingEvidence: no fit was recorded yet.
        """
        trajectory = self.trajectory
        return Attributor(
            self._module,
            train=self._trainer.train_dataloader,
            trajectory=trajectory,
            trainer=self._trainer,
            loss=self.loss,
            parameters=self.parameters,
        )

    def _score_at_end(self, trainer: Any, module: Any) -> None:
        """Run the methods on what was captured."""
        if not self.methods or self.run_dir is None:
            return
        if trainer.world_size > 1:
            rank_zero_warn(
                f"Under {trainer.world_size} processes a fit is captured and `methods` do not run yet. "
                f"Ask in one process afterwards:\n{offline_lines(self.run_dir)}"
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
        """Wire the loaders: the only hook that is always early enough."""
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
        self._resolved = resolve_dirpath(trainer, self.dirpath)
        check_writable(trainer, self._resolved)
        check_queries(self.queries)
        self._trainer, self._module = trainer, pl_module
        self._tap = LoaderTap.acquire(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Claim a run and write the initial checkpoint."""
        if self._tap is None or self._resolved is None:
            return
        parent, made = resume_point(self._restored, trainer)
        error = folder = None
        if trainer.is_global_zero:
            try:
                folder = str(claim_run(self._resolved))
            except OSError as problem:
                error = problem.strerror or str(problem)
        folder, error = trainer.strategy.broadcast((folder, error))
        if error is not None:
            raise MisconfigurationException(
                f"Expected to make a run in `{self._resolved}`, got {error!r}. Pass another `dirpath=`."
            )
        self.run_dir = Path(folder)
        store = RunWriter(folder_for_rank(self.run_dir, trainer.global_rank), trainer.world_size, parent)
        self._recorder = Recorder(trainer, pl_module, self._tap, store, self._schedule, self.sample_id, made)
        self._recorder.starts()
        self._during = DuringFit(self._plan, trainer, pl_module, self.run_dir)
        self._recorder.steps.follower = self._during.loop.stepped
        self._during.starts(None if parent is None else parent_run(self.run_dir, vars(parent)), made)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at loaders and optimizers again."""
        if self._recorder is not None:
            self._recorder.epoch_starts()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note the examples of the batch."""
        if self._recorder is not None and self._during is not None:
            recorded = self._recorder.batch_starts(batch)
            self._during.batch_starts(recorded, recorded.ids, batch)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """An accumulation begins."""
        if self._recorder is not None:
            self._recorder.steps.windows.before_zero_grad(optimizer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """In manual optimization an accumulation may begin."""
        if self._recorder is not None:
            self._recorder.steps.windows.before_backward()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """A step is about to be made."""
        if self._recorder is not None and self._during is not None:
            self._recorder.steps.before_step(optimizer)
            self._during.loop.before_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Close the batch."""
        if self._recorder is not None:
            self._recorder.batch_ended(batch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write a checkpoint where one is due."""
        if self._recorder is not None:
            self._recorder.epoch_ended()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the final checkpoint, then score."""
        if self._recorder is None or self._during is None:
            return
        self._recorder.ended()
        self._during.save(self._recorder.made)
        self.scores.reasons |= self._during.lost
        self._stop()
        self._score_at_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what is known and put everything back; Lightning calls no `teardown` after an error."""
        if self._recorder is not None:
            self._recorder.interrupted()
        self._unwire(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put everything back."""
        if stage == "fit":
            self._unwire(trainer)

    # ---- state ----

    @property
    def state_key(self) -> str:
        """Tells two of these callbacks in one Trainer apart."""
        return self._generate_state_key(
            dirpath=self.dirpath,
            methods=sorted(self.methods),
            every_n_epochs=self._schedule.every_n_epochs,
            every_n_train_steps=self._schedule.every_n_train_steps,
            parameters=self.parameters,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where a resumed fit finds this one: builtins only, or a user's checkpoint could not be loaded safely."""
        if self._recorder is None or self.run_dir is None:
            return {}
        self._recorder.flush()  # whoever resumes from this checkpoint finds every step before it
        if self._during is not None:
            self._during.save(self._recorder.made)
        if not self._recorder.alive:
            return {}
        link = {"run": self.run_dir.name, "path": str(self.run_dir), "step": self._recorder.made}
        return link | {"id": self._recorder.manifest["id"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the run that is resumed."""
        self._restored = dict(state_dict)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Find the state of an `Influence` with other arguments, such as a method added since."""
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
