"""What each optimizer step did: its micro-batches, learning rates, settings and clipping."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_influence.capture.randomness import moved_since, read_generators
from lightning_influence.trajectory.files import GENERATORS
from lightning_influence.types import clean


@dataclass
class RecordedBatch:
    """One forward and backward pass."""

    ids: list[list[int] | None]  # one entry a loader
    size: int | None
    before: dict[str, Any] | None  # the generators before the forward; None once compared
    drew: dict[str, bytes] | None = None
    read: dict[str, bytes] | None = None  # likewise before its examples were read
    lossless: bool = False  # `training_step` returned None: it was forward only


class StepRecorder:
    """Follows the optimizers of a fit.

    Torch's own step hooks are the one event that every loop has: Lightning's are absent with raw optimizers in manual
    optimization, and `on_train_batch_end` sees the next learning rate. A skipped step of a GradScaler fires no torch
    hook (or, fused, one with `found_inf`).
    """

    def __init__(self, trainer: Any, module: Any, made: int) -> None:
        self.made = made  # updates so far, over all optimizers
        self.settings: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self._open: list[tuple[dict[str, Any], list[RecordedBatch]]] = []  # steps of the batch that is under way
        self._trainer, self._module = trainer, module
        self._device = trainer.strategy.root_device
        self._optimizers: list[Optimizer] = []
        self._handles: list[Any] = []
        self._windows: list[list[RecordedBatch]] = []
        self._finished: list[bool] = []  # whether the window's step was made
        self._announced: list[Tensor | bool | None] = []  # False, or the clip coefficient of a step about to be made
        self._current: RecordedBatch | None = None
        self._settings_of: dict[int, tuple[Any, int]] = {}
        self._names = {p: clean(name) for name, p in module.named_parameters()}
        self.watch()

    def watch(self) -> None:
        """Hook the Trainer's optimizers; again where a callback replaced them."""
        optimizers = list(self._trainer.optimizers)
        if [id(o) for o in optimizers] == [id(o) for o in self._optimizers]:
            return
        self.unwatch()
        self._optimizers = optimizers
        self._windows = [[] for _ in optimizers]
        self._finished = [False] * len(optimizers)
        self._announced = [False] * len(optimizers)
        self._handles = [o.register_step_post_hook(partial(self._stepped, i)) for i, o in enumerate(optimizers)]

    def unwatch(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []

    def batch_starts(self, ids: list[list[int] | None], size: int | None, read: dict[str, bytes] | None = None) -> None:
        """A micro-batch is about to go forward."""
        lossless = self._module.automatic_optimization  # until its backward pass is announced
        self._current = RecordedBatch(ids, size, read_generators(self._device), read=read, lossless=lossless)
        for i, finished in enumerate(self._finished):
            if finished:
                self._windows[i], self._finished[i] = [], False
            self._windows[i].append(self._current)

    def before_zero_grad(self, optimizer: Optimizer) -> None:
        """What was accumulated is thrown away: the window begins with the current micro-batch."""
        for i, known in enumerate(self._optimizers):
            if known is _unwrap(optimizer):
                self._restart(i)

    def before_backward(self) -> None:
        """In manual optimization nobody tells of `zero_grad`, but it leaves no gradients."""
        if self._current is not None:
            self._current.lossless = False
        if not self._module.automatic_optimization:
            for i, optimizer in enumerate(self._optimizers):
                if _has_no_gradients(optimizer):
                    self._restart(i)

    def before_step(self, optimizer: Optimizer) -> None:
        """Lightning is about to step: gradients are whole, unscaled (unless fused) and not clipped."""
        for i, known in enumerate(self._optimizers):
            if known is _unwrap(optimizer):
                self._announced[i] = self._clip_coefficient(known)

    def batch_ended(self) -> None:
        """Close the steps of this batch."""
        for i, announced in enumerate(self._announced):
            if announced is not False:  # announced and never made: a GradScaler found an infinite gradient
                self._record(i, self._optimizers[i], skipped=True)
        if self._current is not None and self._current.before is not None:
            self._current.drew = moved_since(self._current.before, self._device)
            self._current.before = None
        self._current = None
        for row, window in self._open:
            self.rows.append(row | _columns_of(window))
        self._open.clear()

    def drain(self) -> list[dict[str, Any]]:
        """The closed rows, handed over."""
        rows, self.rows = self.rows, []
        clips = [row["clip"] for row in rows]
        if any(isinstance(clip, Tensor) for clip in clips):  # read here, together: never a synchronisation in a step
            for row in rows:
                row["clip"] = None if row["clip"] is None else float(row["clip"])
        return rows

    def _restart(self, i: int) -> None:
        self._windows[i] = [] if self._current is None else [self._current]
        self._finished[i] = False

    def _stepped(self, i: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._trainer.fit_loop._skip_backward:  # the extra epoch of StochasticWeightAveraging updates nothing
            self._announced[i] = False
            return
        found_inf = getattr(optimizer, "found_inf", None)  # set on fused optimizers only, by the GradScaler
        infinite = found_inf is not None and bool(found_inf)
        lossless = bool(self._windows[i]) and all(micro.lossless for micro in self._windows[i])
        self._record(i, optimizer, skipped=infinite or (lossless and _has_no_gradients(optimizer)))

    def _record(self, i: int, optimizer: Optimizer, skipped: bool) -> None:
        if not skipped:
            self.made += 1
        clip = self._announced[i]
        row = {
            "step": self.made,
            "optimizer": i,
            "epoch": self._trainer.current_epoch,
            "divisor": self._trainer.accumulate_grad_batches if self._module.automatic_optimization else 1,
            # here the learning rate is the one applied: schedulers step later, warm-up in `optimizer_step` came before
            "lr": [float(group["lr"]) for group in optimizer.param_groups],
            "settings": self._settings_entry(i, optimizer),
            "clip": None if isinstance(clip, bool) else clip,
            "skipped": skipped,
        }
        self._open.append((row, [micro for micro in self._windows[i] if not micro.lossless]))
        self._announced[i], self._finished[i] = False, True
        if self._current is None:  # a step outside of any batch, such as in `on_train_epoch_end`
            self.batch_ended()

    def _settings_entry(self, i: int, optimizer: Optimizer) -> int:
        groups = optimizer.param_groups
        options = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in groups]
        seen = options, [[(id(p), p.requires_grad) for p in g["params"]] for g in groups]
        clipping = self._clipping()
        known = self._settings_of.get(i)
        if known is not None and known[0] == (id(optimizer), seen, clipping):
            return known[1]
        described = [
            {key: _plain(value) for key, value in of_group.items() if key != "param_names"}
            | {"parameters": [self._name_of(p) for p in group["params"]]}
            for of_group, group in zip(options, groups, strict=True)
        ]
        frozen = [self._name_of(p) for group in groups for p in group["params"] if not p.requires_grad]
        entry = {"optimizer": i, "kind": type(optimizer).__name__, "groups": described, "frozen": frozen}
        self.settings.append(entry | {"clipping": clipping})
        self._settings_of[i] = ((id(optimizer), seen, clipping), len(self.settings) - 1)
        return len(self.settings) - 1

    def _clipping(self) -> dict[str, Any] | None:
        """What Lightning clips gradients by; None where it does not, or in manual optimization, which nobody sees."""
        if not self._module.automatic_optimization:
            return None
        if _is_own(type(self._module), "configure_gradient_clipping"):
            return {"algorithm": "own", "limit": None}
        limit = self._trainer.gradient_clip_val
        algorithm = self._trainer.gradient_clip_algorithm
        return {"algorithm": str(getattr(algorithm, "value", algorithm) or "norm"), "limit": limit} if limit else None

    def _name_of(self, parameter: Tensor) -> str:
        if parameter not in self._names:  # made during the fit
            self._names = {p: clean(name) for name, p in self._module.named_parameters()}
        return self._names.get(parameter, "")  # type: ignore[call-overload]

    def _clip_coefficient(self, optimizer: Optimizer) -> Tensor | None:
        limit = self._trainer.gradient_clip_val
        if not limit or not self._module.automatic_optimization or self.clips_untold:
            return None
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return None
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            return (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it

    @property
    def clips_untold(self) -> bool:
        """Whether gradients are clipped otherwise than by one number for all, which alone is recorded."""
        by_value = self._trainer.gradient_clip_val and self._trainer.gradient_clip_algorithm not in (None, "norm")
        return bool(by_value or _is_own(type(self._module), "configure_gradient_clipping"))


def _is_own(cls: type, hook: str) -> bool:
    definer = next((c for c in cls.__mro__ if hook in vars(c)), None)
    return definer is not None and not definer.__module__.startswith(("pytorch_lightning.", "lightning.pytorch."))


def _has_no_gradients(optimizer: Optimizer) -> bool:
    """None, or zero where `zero_grad(set_to_none=False)` left them; the first other number ends the search."""
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
    return not any(g is not None and (g.is_sparse or bool(g.any())) for g in gradients)


def _unwrap(optimizer: Any) -> Any:
    return getattr(optimizer, "_optimizer", optimizer)


def _plain(value: Any) -> Any:
    """A setting as JSON knows it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def _columns_of(window: list[RecordedBatch]) -> dict[str, Any]:
    single = all(len(micro.ids) == 1 for micro in window)
    ids = [micro.ids[0] for micro in window] if single else None
    by_loader = None if single or not window else [micro.ids for micro in window]
    return {
        "ids": None if ids is None or any(x is None for x in ids) else ids,
        "loader_ids": by_loader,
        "sizes": [micro.size for micro in window],
        "rng": _by_generator([micro.drew for micro in window]),
        "read_rng": _by_generator([micro.read for micro in window]),
    }


def _by_generator(states: list[dict[str, bytes] | None]) -> list[dict[str, bytes | None] | None] | None:
    found = [None if of_batch is None else {name: of_batch.get(name) for name in GENERATORS} for of_batch in states]
    return found if any(found) else None


def batch_size(batch: Any, ids: list[list[int] | None]) -> int | None:
    """Examples in a micro-batch, as far as it can be seen."""
    if len(ids) == 1 and ids[0] is not None:
        return len(ids[0])
    find: Callable[[Any], Any] = torch.utils._pytree.tree_leaves
    return next((len(leaf) for leaf in find(batch) if isinstance(leaf, Tensor) and leaf.dim()), None)
