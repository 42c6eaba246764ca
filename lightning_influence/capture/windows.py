"""Which micro-batches are summed in the gradients of each optimizer step. Steps and trackers both read it here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_influence.capture.places import CannotRecord


@dataclass(eq=False)
class RecordedBatch:
    """One micro-batch: a forward pass, and a backward pass unless it has no loss."""

    ids: list[list[int] | None]  # one entry per loader
    size: int | None
    index: int  # `batch_idx`
    before: dict[str, Any] | None  # random states before the forward pass; None once compared
    drew: dict[str, bytes] | None = None  # of those, the generators that it used
    read: dict[str, bytes] | None = None  # likewise, before its examples were read
    lossless: bool = False  # `training_step` returned None


@dataclass(eq=False)
class Window:
    """The micro-batches since the gradients of an optimizer were last zero."""

    index: int
    optimizer: Optimizer
    batches: list[RecordedBatch] = field(default_factory=list)
    finished: bool = False  # the step was made: the next micro-batch begins a new window
    announced: bool = False  # Lightning is about to step
    clip: Tensor | None = None  # coefficient by which that step's gradients are clipped

    @property
    def with_loss(self) -> list[RecordedBatch]:
        """Those with a backward pass."""
        return [batch for batch in self.batches if not batch.lossless]


class AccumulationWindows:
    """The accumulation windows of all optimizers of a fit.

    Torch's step hooks are the only event that every training loop has: Lightning's are absent with raw optimizers in
    manual optimization, and `on_train_batch_end` sees the next learning rate. When a GradScaler skips a step, torch
    calls no hook (or, with a fused optimizer, one with `found_inf`).

    Args:
        trainer: of the fit.
        module: the LightningModule.
        on_step: called after each step, made or skipped, with its window and whether it was skipped.
    """

    def __init__(self, trainer: Any, module: Any, on_step: Callable[[Window, bool], None]) -> None:
        self.current: RecordedBatch | None = None
        self._trainer, self._module, self._on_step = trainer, module, on_step
        self._windows: list[Window] = []
        self._handles: list[Any] = []
        self._error: Exception | None = None  # of a hook inside the user's `optimizer.step`, which must not fail
        self.watch()

    def watch(self) -> None:
        """Register hooks on the Trainer's optimizers; again after a callback has replaced them."""
        optimizers = list(self._trainer.optimizers)
        if [id(o) for o in optimizers] == [id(window.optimizer) for window in self._windows]:
            return
        self.unwatch()
        for optimizer in optimizers:
            if not hasattr(optimizer, "register_step_post_hook"):
                raise CannotRecord(
                    f"Expected optimizers that are `torch.optim.Optimizer`s, got {type(optimizer).__name__}, whose"
                    " steps cannot be followed. Derive it from `torch.optim.Optimizer`, or leave the callback out."
                )
        self._windows = [Window(i, optimizer) for i, optimizer in enumerate(optimizers)]
        self._handles = [w.optimizer.register_step_post_hook(partial(self._stepped, w)) for w in self._windows]

    def unwatch(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._windows = [], []

    def batch_starts(self, batch: RecordedBatch) -> None:
        """Add a micro-batch, before its forward pass."""
        self.current = batch
        for window in self._windows:
            if window.finished:
                window.batches, window.finished = [], False
            window.batches.append(batch)

    def before_zero_grad(self, optimizer: Any) -> None:
        """Accumulated gradients are discarded: the window begins with the current micro-batch."""
        if (window := self.of(optimizer)) is not None:
            self._restart(window)

    def before_backward(self) -> None:
        """The micro-batch has a loss. In manual optimization, `zero_grad` calls no hook but leaves no gradients."""
        if self.current is not None:
            self.current.lossless = False
        if not self._module.automatic_optimization:
            for window in self._windows:
                if _has_no_gradients(window.optimizer):
                    self._restart(window)

    def batch_ended(self) -> None:
        """Report announced steps that were not made, because a GradScaler found an infinite gradient.

        Raises:
            Exception: what went wrong in recording a step.
        """
        if self._error is not None:
            raise self._error
        for window in self._windows:
            if window.announced:
                self._finish(window, skipped=True)
        self.current = None

    def of(self, optimizer: Any) -> Window | None:
        """Return the window of an optimizer, which Lightning may have wrapped."""
        inner = getattr(optimizer, "_optimizer", optimizer)
        for window in self._windows:
            if window.optimizer is inner:
                return window
        return None

    def _restart(self, window: Window) -> None:
        window.batches = [] if self.current is None else [self.current]
        window.finished = False

    def _stepped(self, window: Window, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._error is None:
            try:
                self._after_step(window, optimizer)
            except Exception as error:
                self._error = error

    def _after_step(self, window: Window, optimizer: Optimizer) -> None:
        if self._trainer.fit_loop._skip_backward:  # the extra epoch of StochasticWeightAveraging
            window.announced, window.clip = False, None
            return
        found_inf = getattr(optimizer, "found_inf", None)  # set on fused optimizers only, by the GradScaler
        infinite = found_inf is not None and bool(found_inf)
        lossless = bool(window.batches) and all(batch.lossless for batch in window.batches)
        self._finish(window, skipped=infinite or (lossless and _has_no_gradients(optimizer)))

    def _finish(self, window: Window, skipped: bool) -> None:
        window.announced, window.finished = False, True
        self._on_step(window, skipped)
        window.clip = None


def _has_no_gradients(optimizer: Optimizer) -> bool:
    """Whether all gradients are None, or zero as `zero_grad(set_to_none=False)` leaves them."""
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
    return not any(g is not None and (g.is_sparse or bool(g.any())) for g in gradients)
