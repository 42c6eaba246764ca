"""Drives trackers through a fit: passes them micro-batches and steps, and leaves the fit unchanged."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.gradients import Reduction
from lightning_influence.module.buffer_paths import refusal
from lightning_influence.module.quiet import quiet
from lightning_influence.module.step import NoLoss
from lightning_influence.module.task import Loss, Task
from lightning_influence.numerics.clipping import ByValue
from lightning_influence.numerics.optimizers import UpdateInput, rule_for
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.tracking.buffer_paths import BufferWatch
from lightning_influence.tracking.errors import PlanError, Untrackable
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
from lightning_influence.tracking.tracker import TrackedFit, TrackedStep, Tracker, TrackingPlan, WeightUpdate
from lightning_influence.types import clean


@dataclass
class TrackerRecord:
    """One tracker and how it fares.

    Args:
        tracker: the tracker.
        name: of its record on disk.
        plan: its estimated cost.
        lost: why tracking ended early; None: it has not.
    """

    tracker: Tracker
    name: str
    plan: TrackingPlan | None = None
    lost: str | None = None


class TrackerLoop:
    """All trackers of a fit.

    Fits that cannot be tracked are refused before the first step. Problems found later end the tracking, not the fit.

    Args:
        trainer: of the fit.
        module: the LightningModule.
        run: folder of this fit.
        trackers: by the name of their record.
        loss: per-sample losses, or None for ``training_step``.
        max_cost: largest time that tracking may take, relative to the plain fit.
    """

    def __init__(
        self, trainer: Any, module: Any, run: Path, trackers: Mapping[str, Tracker], loss: Loss | None, max_cost: float
    ) -> None:
        self._trainer, self._module, self._run, self._loss, self._max_cost = trainer, module, run, loss, max_cost
        self.tracked = [TrackerRecord(tracker, name) for name, tracker in trackers.items()]
        # entries disappear with the micro-batch, once no accumulation window holds it
        self._pending: WeakKeyDictionary[object, _PendingBatch] = WeakKeyDictionary()
        self._before: dict[str, tuple[Tensor, Tensor, dict[str, Tensor]]] = {}
        self._buffers = BufferWatch()
        self._steps = 0
        self._checked = self._verifies = False

    # ---- before the first step ------------------------------------------------------------------------------------

    def starts(self, setting: Setting, parent: Path | None, made: int) -> None:
        """Start the trackers.

        Args:
            setting: computes gradients of the training examples and the queries.
            parent: folder of the run that this fit resumes.
            made: weight updates so far.

        Raises:
            Untrackable: this fit cannot be tracked.
        """
        refuse(self._trainer, self._module, setting.engine, self._differentiates)
        self._trained = trained(self._module)
        self._engine, self._queries = setting.engine, setting.queries
        self._last_asked = setting.task if setting.queries is None else setting.queries.engine.task
        self._mean = {Reduction.NONE: None, Reduction.SUM: False}.get(setting.engine.reduction, True)
        setting.engine.width(setting.examples)
        fit = self._fit(setting, None if parent is None else parent.parent)
        for each in self.tracked:
            state = load_state(parent / FOLDER / each.name, made) if made > 0 and parent is not None else None
            if made > 0 and state is None:
                raise Untrackable(
                    f"Expected the state of `{each.name}` at step {made}, from which this fit resumes, got nothing "
                    f"in `{parent}`: earlier steps are unknown. Fit from the start, or leave the method out."
                )
            folder = self._run / FOLDER / each.name
            folder.mkdir(parents=True, exist_ok=True)
            each.tracker = each.tracker.chosen(fit)
            plan = each.plan = each.tracker.starts(replace(fit, folder=folder), state)
            if plan.steps is not None and plan.steps > self._max_cost:
                raise PlanError(
                    f"Expected tracking for `{each.name}` to take at most `max_cost={self._max_cost:g}` times the "
                    f"plain step, got {plan}. Track fewer `examples=`, use `hessian=False`, or `HyDRA()` after the "
                    "fit, or raise `max_cost`."
                )

    def _fit(self, setting: Setting, resumed: Path | None) -> TrackedFit:
        trainer = self._trainer
        sizes = getattr(trainer.train_dataloader, "batch_size", None), trainer.accumulate_grad_batches
        rule, states = None, 0
        if self._differentiates:
            rule = rule_for(type(self._optimizer).__name__)
            for group in self._optimizer.param_groups:
                rule.check(group)
                states = max(states, states_of(rule, group))
        count = min(sizes[0] or 1, len(setting.examples))
        sample = Block(0, count, setting.examples.some(range(count)), setting.examples.one)
        total = trainer.estimated_stepping_batches
        return TrackedFit(
            engine=setting.engine,
            n_train=len(setting.examples),
            steps=int(total) if total not in (-1, float("inf")) else None,
            batch_sizes=sizes,
            uniform=rule is not None and rule.uniform and not isinstance(clipping_of(trainer), ByValue),
            queries=None if setting.queries is None else setting.queries[:],
            states=states,
            folder=self._run,
            resumed=resumed,
            free_disk=shutil.disk_usage(self._run).free,
            sample=sample,
            seconds=plain_seconds(setting, sample),
        )

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def batch_starts(self, batch: object, ids: Sequence[int] | None, data: Any, batch_idx: int) -> None:
        """Pass the trackers a micro-batch, with the module in the state of its forward pass.

        Args:
            batch: key for it, used again in ``stepped``; what trackers keep is released together with this object.
            ids: of its examples, or None if they are unknown.
            data: the batch that ``training_step`` will receive.
            batch_idx: its index, likewise.
        """
        if not self._active():
            return
        if self._differentiates and (why := changed(self._trained, trained(self._module))) is not None:
            self.give_up(why)
            return
        if ids is None:
            self.give_up("it is not known which examples are in a batch. Pass `sample_id=`.")
            return
        with (
            self._guarded(),
            contextlib.suppress(NoLoss),
            quiet(self._module, self._loss, self._trainer, evaluate=False) as task,
        ):
            task.batch_idx = batch_idx
            self._look_for_paths(task, data)
            present = self._micro_batch(PreparedTask.of(task), tuple(ids), data)
            payloads = {each.name: each.tracker.batch(present) for each in self._active()}
            self._pending[batch] = _PendingBatch(present.ids, payloads, present.whole() if self._is_due() else None)

    def before_step(self) -> None:
        """Keep weights, gradients and optimizer state; gradients are complete and not yet clipped."""
        if not self._differentiates:
            return
        rule, clipping = rule_for(type(self._optimizer).__name__), clipping_of(self._trainer)
        self._verifies = self._is_due()
        keep: Callable[[Tensor], Tensor] = torch.clone if self._verifies or not rule.uniform else torch.detach
        self._before = {}
        for name, parameter in self._updated():
            kept = self._optimizer.state.get(parameter, {})
            state = {
                key: keep(value.detach())
                for key, value in kept.items()
                if key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape
            }
            assert parameter.grad is not None
            gradient = parameter.grad.detach()
            raw = gradient.clone() if clipping is not None else gradient
            self._before[name] = keep(parameter.detach()), raw, state

    def stepped(self, made: int, batches: Sequence[object]) -> None:
        """Pass the trackers a step.

        Args:
            made: weight updates so far, including this one.
            batches: keys of the micro-batches whose gradients were summed.
        """
        if not self._active():
            return
        if not batches:  # no loss since the last step, so no update
            if self._before:
                self.give_up("the optimizer updated weights in a step without a loss")
            return
        window = [self._pending[batch] for batch in batches if batch in self._pending]
        if len(window) < len(batches):
            self.give_up("`training_step` returned a loss for a batch for which it returned None before")
            return
        with self._guarded():
            self._steps += 1
            update = self._update() if self._differentiates else None
            if update is not None and self._verifies:
                verify_step(update, dict(self._updated()))
                verify_gradients(update, [pending.gradients for pending in window if pending.gradients is not None])
            with contextlib.ExitStack() as stack:
                queries = self._evaluated(stack)
                for each in self._active():
                    payloads = [pending.payloads[each.name] for pending in window]
                    step = TrackedStep(made, payloads, [pending.ids for pending in window], update)
                    each.tracker.stepped(step, queries)
        self._before = {}

    def close(self) -> None:
        """Release working files; harmless when repeated."""
        for each in self.tracked:
            each.tracker.close()

    def save(self, made: int) -> None:
        """Write the state of each tracker after a step."""
        for each in self._active():
            folder = self._run / FOLDER / each.name
            with self._guarded():
                save_state(folder, made, each.tracker.state())

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        """Whether to verify the next step: steps 1, 2, 4, 8 ... if trackers differentiate them."""
        return (self._steps + 1) & self._steps == 0 and self._differentiates

    @property
    def _differentiates(self) -> bool:
        return any(each.tracker.differentiates for each in self._active())

    def _active(self) -> list[TrackerRecord]:
        return [each for each in self.tracked if each.lost is None]

    def give_up(self, why: str) -> None:
        """End the tracking, for a reason that the methods' scores will name."""
        for each in self._active():
            each.lost = why

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """An exception ends the tracking instead of the fit."""
        try:
            yield
        except Exception as error:
            self.give_up(f"{type(error).__name__}: {error}")

    @property
    def _optimizer(self) -> Any:
        optimizer = self._trainer.optimizers[0]
        return getattr(optimizer, "_optimizer", optimizer)

    def _updated(self) -> list[tuple[str, Tensor]]:
        names = {p: clean(name) for name, p in self._module.named_parameters()}
        groups = self._optimizer.param_groups
        return [(names[p], p) for group in groups for p in group["params"] if p.grad is not None]

    def _evaluated(self, stack: contextlib.ExitStack) -> Queries | None:
        """The queries at the current weights, in eval mode; None if no tracker uses them."""
        if self._queries is None or not any(each.tracker.sees_queries for each in self._active()):
            return None
        task = stack.enter_context(quiet(self._module, self._loss, self._trainer))
        task.tail, self._last_asked = self._last_asked.tail, task
        stack.enter_context(task.at(0))
        return replace(self._queries, engine=replace(self._queries.engine, task=task))[:]

    def _look_for_paths(self, task: Task, data: Any) -> None:
        """Ends the trackers whose derivatives would lack what the weights change through a buffer."""
        if any(each.tracker.hessian for each in self._active()):
            name = self._buffers.carrier(PreparedTask.of(task), self._trained, data)
            for each in self._active():
                if name is not None and each.tracker.hessian:
                    each.lost = refusal(name)

    def _micro_batch(self, task: PreparedTask, ids: tuple[int, ...], batch: Any) -> TrackedMicroBatch:
        engine = replace(self._engine, task=task)
        if not self._checked:
            if engine.reduction is Reduction.NONE:
                self._mean = takes_mean(task, batch)
            else:
                refuse_mixed(task, ids, batch, engine)
            self._checked = True
        weights = engine.weights_of(ids)
        whole = (len(ids) if self._mean else 1) if weights is None else float(weights.sum()) or 1.0
        share = 1.0 / (self._trainer.accumulate_grad_batches * whole)
        return TrackedMicroBatch(engine, ids, batch, share)

    def _update(self) -> WeightUpdate:
        if not self._before:
            raise Untrackable("the optimizer stepped without `on_before_optimizer_step`, as in manual optimization.")
        rule = rule_for(type(self._optimizer).__name__)
        inputs: dict[str, UpdateInput] = {}
        raw: dict[str, Tensor] = {}
        names = {parameter: name for name, parameter in self._updated()}
        for group in self._optimizer.param_groups:
            rule.check(group)
            options = {key: value for key, value in group.items() if key != "params"}
            for parameter in [p for p in group["params"] if p.grad is not None]:
                name = names[parameter]
                weight, raw[name], state = self._before[name]
                count = int(self._optimizer.state.get(parameter, {}).get("step", 1)) - 1
                inputs[name] = UpdateInput(weight, parameter.grad.detach(), state, count, options)
        return WeightUpdate(rule, inputs, clipping_of(self._trainer), raw)


@dataclass(frozen=True)
class _PendingBatch:
    """A micro-batch before its step: ids, what each tracker keeps, and the gradient if the step is verified."""

    ids: tuple[int, ...]
    payloads: dict[str, Any]
    gradients: dict[str, Tensor] | None
