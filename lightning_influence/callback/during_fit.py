"""What `Influence` does during a fit for methods whose trackers must see every step."""

import contextlib
from pathlib import Path
from typing import Any

from lightning_influence.callback.plan import ScoringPlan
from lightning_influence.callback.queries import missing_loader, resolve_queries
from lightning_influence.compat import MisconfigurationException, rank_zero_info, rank_zero_warn
from lightning_influence.tracking.tracker import Tracker
from lightning_influence.tracking.tracker_loop import TrackerLoop


class DuringFit:
    """The trackers of one fit. Methods with the same hyper-parameters share a tracker.

    Args:
        plan: methods, queries and `max_cost`.
        trainer: about to train.
        module: the LightningModule.
        run_dir: folder of this fit.
    """

    def __init__(self, plan: ScoringPlan, trainer: Any, module: Any, run_dir: Path) -> None:
        self._plan, self._trainer, self._module = plan, trainer, module
        self._records: dict[str, list[str]] = {}
        self._warned: set[str] = set()
        trackers: dict[str, Tracker] = {}
        for key, method in plan.methods.items():
            tracker = method.tracker()
            if tracker is not None:
                name = method.record
                trackers.setdefault(name, tracker)
                self._records.setdefault(name, []).append(key)
        self.loop = TrackerLoop(trainer, module, run_dir, trackers, plan.loss, plan.max_cost)

    def starts(self, parent: Path | None, made: int) -> None:
        """Estimate the cost of tracking, and start it or refuse before any time is spent on training.

        Args:
            parent: folder of the run that this fit resumes.
            made: weight updates so far.

        What the module or its data forbid ends the tracking with a warning; the fit goes on.

        Raises:
            MisconfigurationException: a method of `methods` cannot track such a fit, or would exceed memory, disk or
                `max_cost`.
        """
        plan, trainer = self._plan, self._trainer
        if plan.methods and (missing := missing_loader(plan.queries, trainer)):
            rank_zero_warn(f"{', '.join(plan.methods)} will not score queries when this fit ends. {missing}")
        if not self._records:
            return
        queries = None
        with contextlib.ExitStack() as stack:
            try:
                if plan.queries is not None:
                    queries = resolve_queries(plan.queries, trainer)
                setting = stack.enter_context(plan.attributor(self._module, trainer).session(queries))
            except Exception as error:
                self.loop.give_up(f"{type(error).__name__}: {error}")
                self._warn()
                return
            try:
                self.loop.starts(setting, parent, made)
            except (ValueError, TypeError) as error:
                raise MisconfigurationException(str(error)) from error
            except Exception as error:
                self.loop.give_up(f"{type(error).__name__}: {error}")
                self._warn()
                return
        for each in self.loop.tracked if plan.verbose else ():
            rank_zero_info(f"Tracking for {', '.join(map(repr, self._records[each.name]))}: {each.plan}.")

    def batch_starts(self, batch: object, ids: list[list[int] | None], data: Any, batch_idx: int) -> None:
        """Show the trackers a micro-batch.

        Args:
            batch: key under which its gradients are kept, see `TrackerLoop.stepped`.
            ids: its examples, one list per loader.
            data: the batch that `training_step` will receive.
            batch_idx: its index, likewise.
        """
        self.loop.batch_starts(batch, ids[0] if len(ids) == 1 else None, data, batch_idx)
        self._warn()

    def save(self, made: int) -> None:
        """Write the trackers' state as of a step, for scores after the fit or for a fit that resumes from there."""
        self.loop.save(made)
        self._warn()

    def close(self) -> None:
        """Release working files; harmless when repeated."""
        self.loop.close()

    @property
    def lost(self) -> dict[str, str]:
        """Why tracking ended early, by the key of the method."""
        return {key: each.lost for each in self.loop.tracked if each.lost for key in self._records[each.name]}

    def _warn(self) -> None:
        """Warn once per method that is no longer tracked."""
        for key, why in self.lost.items():
            if key not in self._warned:
                self._warned.add(key)
                rank_zero_warn(f"{key!r} is no longer tracked; the fit goes on. {why}")
