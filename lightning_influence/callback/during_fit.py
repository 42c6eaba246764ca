"""What `Influence` does while a fit runs, for methods that must watch it: plan, refuse, follow, and tell of losses."""

from pathlib import Path
from typing import Any

from lightning_influence.attribution.attributor import Attributor
from lightning_influence.callback.end_of_fit import resolve_queries
from lightning_influence.compat import MisconfigurationException, rank_zero_info, rank_zero_warn
from lightning_influence.tracking import Tracker
from lightning_influence.tracking.tracker_loop import TrackerLoop


class DuringFit:
    """The trackers of an `Influence`'s methods on one fit.

    Args:
        influence: the callback, for its settings.
        trainer: about to train.
        module: the LightningModule.
    """

    def __init__(self, influence: Any, trainer: Any, module: Any) -> None:
        self._influence, self._trainer, self._module = influence, trainer, module
        self._records: dict[str, list[str]] = {}
        self._told: set[str] = set()
        trackers: dict[str, Tracker] = {}
        for key, method in influence.methods.items():
            tracker = method.tracker()
            if tracker is not None:
                name = method.record
                trackers.setdefault(name, tracker)
                self._records.setdefault(name, []).append(key)
        self._watch: TrackerLoop | None = None
        if trackers:
            self._watch = TrackerLoop(trainer, module, influence.run_dir, trackers, influence.loss, influence.max_cost)

    def starts(self, parent: Path | None, made: int) -> None:
        """Plans, shows what tracking will take, and refuses before any time is spent on training.

        Args:
            parent: folder of the run that this fit resumes.
            made: updates of weights so far.

        Raises:
            MisconfigurationException: a fit that cannot be followed, or a plan beyond memory, disk or `max_cost`.
        """
        if self._watch is None:
            return
        influence, trainer = self._influence, self._trainer
        try:
            attributor = Attributor(
                self._module,
                train=trainer.train_dataloader,
                trainer=trainer,
                loss=influence.loss,
                parameters=influence.parameters,
            )
            queries = None if influence.queries is None else resolve_queries(influence.queries, trainer)
            with attributor.session(queries) as session:
                self._watch.starts(session, parent, made)
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(str(error)) from error
        for each in self._watch.tracked:
            rank_zero_info(f"Tracking for {', '.join(map(repr, self._records[each.name]))}: {each.plan}.")

    def epoch_starts(self) -> None:
        """Forward to the watch."""
        if self._watch is not None:
            self._watch.epoch_starts()

    def batch_starts(self, ids: list[list[int] | None], batch: Any) -> None:
        """Forward to the watch."""
        if self._watch is not None:
            self._watch.batch_starts(ids[0] if len(ids) == 1 else None, batch)
            self._tell()

    def before_zero_grad(self) -> None:
        """Forward to the watch."""
        if self._watch is not None:
            self._watch.before_zero_grad()

    def before_backward(self) -> None:
        """Forward to the watch."""
        if self._watch is not None:
            self._watch.before_backward()

    def before_step(self) -> None:
        """Forward to the watch."""
        if self._watch is not None:
            self._watch.before_step()

    def save(self, made: int) -> None:
        """Write what is held as of a step, for whoever resumes from it or asks afterwards."""
        if self._watch is not None:
            self._watch.save(made)
            self._tell()

    def close(self) -> None:
        """Take the hook out; harmless when repeated."""
        if self._watch is not None:
            self._watch.close()

    @property
    def lost(self) -> dict[str, str]:
        """Why methods cannot be asked, by their key."""
        if self._watch is None:
            return {}
        return {key: each.lost for each in self._watch.tracked if each.lost for key in self._records[each.name]}

    def _tell(self) -> None:
        """Says once what was given up."""
        for key, why in self.lost.items():
            if key not in self._told:
                self._told.add(key)
                rank_zero_warn(f"{key!r} is not tracked any more, the fit goes on: {why}")
