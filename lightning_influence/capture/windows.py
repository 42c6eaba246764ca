"""Which micro-batches the gradients of each optimizer step are made of: the one place that follows accumulation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


@dataclass(eq=False)
class RecordedBatch:
    """One micro-batch: a forward pass, and a backward pass unless it has no loss."""

    ids: list[list[int] | None]  # one entry per loader
    size: int | None
    before: dict[str, Any] | None  # the generators before the forward pass; None once compared
    drew: dict[str, bytes] | None = None  # of those, the ones that it drew from
    read: dict[str, bytes] | None = None  # likewise before its examples were read
    lossless: bool = False  # `training_step` returned None


@dataclass(eq=False)
class Window:
    """The micro-batches since an optimizer's gradients were last zero."""

    index: int
    optimizer: Optimizer
    batches: list[RecordedBatch] = field(default_factory=list)
    finished: bool = False  # its step was made: the next micro-batch begins another window
    announced: bool = False  # Lightning is about to step
    clip: Tensor | None = None  # what the gradients of that step will be multiplied by

    @property
    def with_loss(self) -> list[RecordedBatch]:
        """Those that went backward."""
        return [batch for batch in self.batches if not batch.lossless]


class AccumulationWindows:
    """Follows the optimizers of a fit.

    Torch's own step hooks are the one event that every loop has: Lightning's are absent with raw optimizers in manual
    optimization, and `on_train_batch_end` sees the next learning rate. A skipped step of a GradScaler fires no torch
    hook (or, fused, one with `found_inf`).

    Args:
        trainer: of the fit.
        module: the LightningModule.
        on_step: called with a window and whether its step was skipped, when the step was made or failed to be.
    """

    def __init__(self, trainer: Any, module: Any, on_step: Callable[[Window, bool], None]) -> None:
        self.current: RecordedBatch | None = None
        self._trainer, self._module, self._on_step = trainer, module, on_step
        self._windows: list[Window] = []
        self._handles: list[Any] = []
        self.watch()

    def watch(self) -> None:
        """Hook the Trainer's optimizers; again where a callback replaced them."""
        optimizers = list(self._trainer.optimizers)
        if [id(o) for o in optimizers] == [id(window.optimizer) for window in self._windows]:
            return
        self.unwatch()
        self._windows = [Window(i, optimizer) for i, optimizer in enumerate(optimizers)]
        self._handles = [w.optimizer.register_step_post_hook(partial(self._stepped, w)) for w in self._windows]

    def unwatch(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._windows = [], []

    def batch_starts(self, batch: RecordedBatch) -> None:
        """A micro-batch is about to go forward."""
        self.current = batch
        for window in self._windows:
            if window.finished:
                window.batches, window.finished = [], False
            window.batches.append(batch)

    def before_zero_grad(self, optimizer: Any) -> None:
        """What was accumulated is discarded: the window begins with the current micro-batch."""
        if (window := self.of(optimizer)) is not None:
            self._restart(window)

    def before_backward(self) -> None:
        """The micro-batch has a loss. In manual optimization `zero_grad` calls no hook, but leaves no gradients."""
        if self.current is not None:
            self.current.lossless = False
        if not self._module.automatic_optimization:
            for window in self._windows:
                if _has_no_gradients(window.optimizer):
                    self._restart(window)

    def batch_ended(self) -> None:
        """Report the steps that were announced and never made: a GradScaler found an infinite gradient."""
        for window in self._windows:
            if window.announced:
                self._finish(window, skipped=True)
        self.current = None

    def of(self, optimizer: Any) -> Window | None:
        """The window of an optimizer, which Lightning may have wrapped."""
        inner = getattr(optimizer, "_optimizer", optimizer)
        return next((window for window in self._windows if window.optimizer is inner), None)

    def _restart(self, window: Window) -> None:
        window.batches = [] if self.current is None else [self.current]
        window.finished = False

    def _stepped(self, window: Window, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._trainer.fit_loop._skip_backward:  # the extra epoch of StochasticWeightAveraging updates nothing
            window.announced, window.clip = False, None
            return
        found_inf = getattr(optimizer, "found_inf", None)  # set on fused optimizers only, by the GradScaler
        infinite = found_inf is not None and bool(found_inf)
        lossless = bool(window.batches) and not window.with_loss
        self._finish(window, skipped=infinite or (lossless and _has_no_gradients(optimizer)))

    def _finish(self, window: Window, skipped: bool) -> None:
        window.announced, window.finished = False, True
        self._on_step(window, skipped)
        window.clip = None


def _has_no_gradients(optimizer: Optimizer) -> bool:
    """None, or zero where `zero_grad(set_to_none=False)` left them; the first other number ends the search."""
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
    return not any(g is not None and (g.is_sparse or bool(g.any())) for g in gradients)
