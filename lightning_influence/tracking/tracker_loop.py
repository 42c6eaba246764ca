"""Drives trackers through a running fit, as a guest: shows them batches and steps, and puts everything back."""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.gradients import Engine, Reduction
from lightning_influence.module.task import Loss, NoLoss, quiet
from lightning_influence.numerics.clipping import ByValue
from lightning_influence.numerics.optimizers import UpdateInput, rule_for
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.tracking.error_guard import ErrorGuard
from lightning_influence.tracking.estimates import plain_seconds, states_of
from lightning_influence.tracking.micro_batch import PreparedTask, TrackedMicroBatch
from lightning_influence.tracking.record import FOLDER, load_state, save_state
from lightning_influence.tracking.refusals import (
    changed,
    clipping_of,
    refuse,
    refuse_mixed,
    takes_mean,
    trained,
    verify_gradients,
    verify_step,
)
from lightning_influence.tracking.tracker import (
    PlanError,
    TrackedFit,
    TrackedStep,
    Tracker,
    TrackingPlan,
    Untrackable,
    WeightUpdate,
)
from lightning_influence.types import clean


@dataclass
class TrackerRecord:
    """One tracker on its way through a fit.

    Args:
        tracker: itself.
        name: of its record.
        plan: what it said it would take.
        lost: why it was given up, if it was.
    """

    tracker: Tracker
    name: str
    plan: TrackingPlan | None = None
    lost: str | None = None


class TrackerLoop:
    """All trackers of a fit.

    What cannot be followed is refused before the first step; what turns up later ends the tracking, not the fit.

    Args:
        trainer: of the fit.
        module: the LightningModule.
        run: the folder of this fit.
        trackers: by the name of their record.
        loss: per-sample losses, or None for ``training_step``.
        max_cost: times the plain fit that tracking may take.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        run: Path,
        trackers: Mapping[str, Tracker],
        loss: Loss | None,
        max_cost: float,
    ) -> None:
        self._trainer, self._module, self._run, self._loss, self._max_cost = trainer, module, run, loss, max_cost
        self.tracked = [TrackerRecord(tracker, name) for name, tracker in trackers.items()]
        self._engine: Engine | None = None
        self._asked: Queries | None = None
        self._pending: WeakKeyDictionary[object, _PendingBatch] = WeakKeyDictionary()  # gone with their window
        self._places: dict[str, tuple[Tensor, Tensor, dict[str, Tensor]]] = {}
        self._steps = 0
        self._mean: bool | None = None
        self._checked = self._verifies = False

    # ---- before the first step ------------------------------------------------------------------------------------

    def starts(self, session: Setting, parent: Path | None, made: int) -> None:
        """Plans, and refuses.

        Args:
            session: engines for the training data and the queries, under the plan of the self-check.
            parent: folder of the run that this fit resumes.
            made: updates of weights so far.

        Raises:
            Untrackable: this fit cannot be followed.
        """
        refuse(self._trainer, self._module, session.engine, self._derives)
        self._trained = trained(self._module)
        self._engine, self._asked = session.engine, session.queries
        self._mean = {Reduction.MEAN: True, Reduction.SUM: False}.get(session.engine.reduction)
        session.engine.width(session.examples)
        fit = self._fit(session, None if parent is None else parent.parent)
        for each in self.tracked:
            state = None
            if made > 0:
                state = None if parent is None else load_state(parent / FOLDER / each.name, made)
                if state is None:
                    raise Untrackable(
                        f"Expected what `{each.name}` held at step {made}, from which this fit resumes, got nothing in "
                        f"`{parent}`: the steps before are unknown. Fit from the start, or leave the method out."
                    )
            folder = self._run / FOLDER / each.name
            folder.mkdir(parents=True, exist_ok=True)
            each.plan = each.tracker.starts(replace(fit, folder=folder), state)
            self._afford(each, fit)

    def _fit(self, session: Setting, resumed: Path | None) -> TrackedFit:
        trainer = self._trainer
        sizes = getattr(trainer.train_dataloader, "batch_size", None), trainer.accumulate_grad_batches
        rule = rule_for(type(self._optimizer).__name__) if self._derives else None
        asked = session.queries
        count = min(sizes[0] or 1, len(session.examples))
        sample = Block(0, count, session.examples.some(range(count)), session.examples.one)
        total = trainer.estimated_stepping_batches
        return TrackedFit(
            engine=session.engine,
            n_train=len(session.examples),
            steps=int(total) if total not in (-1, float("inf")) else None,
            batch_sizes=sizes,
            uniform=rule is not None and rule.uniform and not isinstance(clipping_of(trainer), ByValue),
            queries=None if asked is None else asked[:],
            states=0 if rule is None else max(states_of(rule, group) for group in self._optimizer.param_groups),
            folder=self._run,
            resumed=resumed,
            free_disk=shutil.disk_usage(self._run).free,
            sample=sample,
            seconds=plain_seconds(session, sample),
        )

    def _afford(self, each: TrackerRecord, fit: TrackedFit) -> None:
        plan = each.plan
        if plan is not None and plan.steps is not None and plan.steps > self._max_cost:
            raise PlanError(
                f"Expected tracking for `{each.name}` to take at most `max_cost={self._max_cost:g}` times the plain "
                f"step, got {plan}. Track fewer `examples=`, take `hessian=False` or `mode='replay'`, or raise "
                "`max_cost`."
            )

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def batch_starts(self, batch: object, ids: Sequence[int] | None, data: Any) -> None:
        """Shows the trackers a micro-batch, with the module as its forward pass will find it.

        Args:
            batch: stands for it in ``stepped``; what trackers keep of it is kept as long as this object.
            ids: its examples, if they are known.
            data: what the module is given.
        """
        if not self._alive:
            return
        if self._derives and (why := changed(self._trained, trained(self._module))) is not None:
            self._lose(why)
            return
        if ids is None:
            self._lose("it is not known which examples are in a batch. Pass `sample_id=`")
            return
        with (
            self._guarded(),
            contextlib.suppress(NoLoss),
            quiet(self._module, self._loss, self._trainer, evaluate=False) as task,
        ):
            present = self._present(PreparedTask.of(task), tuple(ids), data)
            payloads = {each.name: each.tracker.batch(present) for each in self._living()}
            self._pending[batch] = _PendingBatch(present.ids, payloads, present.whole() if self._is_due() else None)

    def before_step(self) -> None:
        """Gradients are whole and not clipped: remembers where every parameter stands."""
        if not self._derives:
            return
        rule, clipping = rule_for(type(self._optimizer).__name__), clipping_of(self._trainer)
        self._verifies = self._is_due()
        place: Callable[[Tensor], Tensor] = torch.clone if self._verifies or not rule.uniform else torch.detach
        self._places = {}
        for name, parameter in self._moving():
            kept = self._optimizer.state.get(parameter, {})
            state = {key: place(value.detach()) for key, value in kept.items() if _like(value, parameter)}
            gradient = _gradient(parameter)
            raw = gradient.clone() if clipping is not None else gradient
            self._places[name] = place(parameter.detach()), raw, state

    def stepped(self, made: int, batches: Sequence[object]) -> None:
        """Shows the trackers a step.

        Args:
            made: updates of weights so far, this one included.
            batches: those of ``batch_starts`` whose gradients were added up.
        """
        if not self._alive:
            return
        if not batches:  # no loss since the last step: nothing moves
            if self._places:
                self._lose("the weights were moved by a step of which no loss went backward")
            return
        window = [self._pending[batch] for batch in batches if batch in self._pending]
        if len(window) < len(batches):
            self._lose("`training_step` returned a loss for a batch for which it had returned None")
            return
        with self._guarded():
            self._steps += 1
            moved = self._moved() if self._derives else None
            if moved is not None and self._verifies:
                verify_step(moved, dict(self._moving()))
                verify_gradients(moved, [pending.gradients for pending in window if pending.gradients is not None])
            with contextlib.ExitStack() as stack:
                queries = self._queries(stack)
                for each in self._living():
                    payloads = [pending.payloads[each.name] for pending in window]
                    step = TrackedStep(made, payloads, [pending.ids for pending in window], moved)
                    each.tracker.stepped(step, queries)
        self._places = {}

    def close(self) -> None:
        """Lets go of working files; harmless when repeated."""
        for each in self.tracked:
            each.tracker.close()

    def save(self, made: int) -> None:
        """Writes what every tracker holds as of a step."""
        for each in self._living():
            folder = self._run / FOLDER / each.name
            with self._guarded():
                save_state(folder, made, each.tracker.state())

    # ---- inside ---------------------------------------------------------------------------------------------------

    @property
    def _alive(self) -> bool:
        return any(each.lost is None for each in self.tracked)

    def _is_due(self) -> bool:
        """Whether the step to come is looked at closely: 1, 2, 4, 8 ... for those who derive something from it."""
        return (self._steps + 1) & self._steps == 0 and self._derives

    @property
    def _derives(self) -> bool:
        return any(each.tracker.derives for each in self._living())

    def _living(self) -> list[TrackerRecord]:
        return [each for each in self.tracked if each.lost is None]

    def _lose(self, why: str) -> None:
        for each in self._living():
            each.lost = why

    def _guarded(self) -> ErrorGuard:
        return ErrorGuard(self._lose)

    @property
    def _optimizer(self) -> Any:
        optimizer = self._trainer.optimizers[0]
        return getattr(optimizer, "_optimizer", optimizer)

    def _moving(self) -> list[tuple[str, Tensor]]:
        names = {p: clean(name) for name, p in self._module.named_parameters()}
        groups = self._optimizer.param_groups
        return [(names[p], p) for group in groups for p in group["params"] if p.grad is not None]

    def _queries(self, stack: contextlib.ExitStack) -> Queries | None:
        """The queries at the present weights, in eval mode, where a tracker looks at them."""
        if self._asked is None or not any(each.tracker.asks for each in self._living()):
            return None
        task = stack.enter_context(quiet(self._module, self._loss, self._trainer))
        return replace(self._asked, engine=replace(self._asked.engine, task=task))[:]

    def _present(self, task: PreparedTask, ids: tuple[int, ...], batch: Any) -> TrackedMicroBatch:
        assert self._engine is not None
        engine = replace(self._engine, task=task)
        if not self._checked:
            if engine.reduction is Reduction.NONE:
                self._mean = takes_mean(task, batch)
            else:
                refuse_mixed(task, ids, batch, engine)
            self._checked = True
        share = 1.0 / (self._trainer.accumulate_grad_batches * (len(ids) if self._mean else 1))
        return TrackedMicroBatch(engine, ids, batch, share)

    def _moved(self) -> WeightUpdate:
        if not self._places:
            raise Untrackable("the optimizer stepped without `on_before_optimizer_step`, as in manual optimization.")
        rule = rule_for(type(self._optimizer).__name__)
        places, raw = {}, {}
        names = dict(self._moving())
        for group in self._optimizer.param_groups:
            rule.check(group)
            options = {key: value for key, value in group.items() if key != "params"}
            own = {id(p) for p in group["params"]}
            for name in [n for n, p in names.items() if id(p) in own]:
                weight, gradient, state = self._places[name]
                count = int(self._optimizer.state.get(names[name], {}).get("step", 1)) - 1
                kept = {key: value for key, value in state.items() if key != "step"}
                places[name] = UpdateInput(weight, _gradient(names[name]), kept, count, options)
                raw[name] = gradient
        return WeightUpdate(rule, places, clipping_of(self._trainer), raw)


@dataclass(frozen=True)
class _PendingBatch:
    """A micro-batch whose gradients wait for their step: its examples, what each tracker keeps, their sum or None."""

    ids: tuple[int, ...]
    payloads: dict[str, Any]
    gradients: dict[str, Tensor] | None


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach()


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
