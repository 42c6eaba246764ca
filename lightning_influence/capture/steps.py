"""Records each optimizer step: its micro-batches, learning rates, optimizer options and clipping."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_influence.capture.gradient_changes import has_own_step
from lightning_influence.capture.places import CannotRecord, shards_weights
from lightning_influence.capture.randomness import moved_since, read_generators
from lightning_influence.capture.windows import AccumulationWindows, RecordedBatch, Window
from lightning_influence.devices import read_numbers
from lightning_influence.module.data_hooks import overrides
from lightning_influence.trajectory.files import GENERATORS
from lightning_influence.types import clean


class StepRecorder:
    """Records one row per optimizer step, in order."""

    def __init__(self, trainer: Any, module: Any, made: int) -> None:
        self.made = made  # weight updates so far, over all optimizers
        self.settings: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.follower: Callable[[int, Sequence[RecordedBatch]], None] | None = None
        """Called after each step with the number of updates and the micro-batches whose gradients it summed."""
        self._open: list[tuple[dict[str, Any], list[RecordedBatch]]] = []  # steps of the current batch
        self._trainer, self._module = trainer, module
        self._device = trainer.strategy.root_device
        self._settings_of: dict[int, tuple[Any, int]] = {}
        self._names = {p: clean(name) for name, p in module.named_parameters()}
        self._clips_itself = overrides(module, "configure_gradient_clipping")
        self._sharded = shards_weights(trainer.strategy)
        self.windows = AccumulationWindows(trainer, module, self._record)

    def batch_starts(
        self, ids: list[list[int] | None], size: int | None, index: int, read: dict[str, bytes] | None = None
    ) -> RecordedBatch:
        """Begin a micro-batch, before its forward pass."""
        lossless = self._module.automatic_optimization  # until its backward pass is announced
        batch = RecordedBatch(ids, size, index, read_generators(self._device), read=read, lossless=lossless)
        self.windows.batch_starts(batch)
        return batch

    def before_step(self, optimizer: Optimizer) -> None:
        """Lightning is about to step: gradients are complete, unscaled (unless fused) and not clipped."""
        if (window := self.windows.of(optimizer)) is not None:
            window.announced, window.clip = True, self._clip_coefficient(window.optimizer)

    def batch_ended(self) -> None:
        """Complete the rows of this batch's steps."""
        batch = self.windows.current
        self.windows.batch_ended()
        if batch is not None and batch.before is not None:
            batch.drew = moved_since(batch.before, self._device)
            batch.before = None
        for row, window in self._open:
            self.rows.append(row | _columns_of(window))
        self._open.clear()

    def drain(self) -> list[dict[str, Any]]:
        """Return the completed rows and forget them."""
        rows, self.rows = self.rows, []
        # What is on a device is read here, all at once, not within a step.
        rates = iter(read_numbers([rate for row in rows for rate in row["lr"] if isinstance(rate, Tensor)]))
        for row in rows:
            row["lr"] = [next(rates)[0] if isinstance(rate, Tensor) else float(rate) for rate in row["lr"]]
            if row["clip"] is not None:
                clip = float(row["clip"])
                row["clip"] = None if self._sharded and math.isnan(clip) else clip
        return rows

    def _record(self, window: Window, skipped: bool) -> None:
        batches = window.with_loss
        if any("lr" not in group for group in window.optimizer.param_groups):
            raise CannotRecord(
                f"Expected every parameter group of {type(window.optimizer).__name__} to have its learning rate under "
                "'lr', got one without. Let the optimizer keep it in `param_groups[i]['lr']`, as those of torch do."
            )
        if not skipped:
            self.made += 1
        row = {
            "step": self.made,
            "optimizer": window.index,
            "epoch": self._trainer.current_epoch,
            "divisor": self._trainer.accumulate_grad_batches if self._module.automatic_optimization else 1,
            # the learning rate applied: schedulers step later, and a warm-up in `optimizer_step` has run already
            "lr": [_as_now(group["lr"]) for group in window.optimizer.param_groups],
            "settings": self._settings_entry(window.index, window.optimizer),
            "clip": self._clipped_by(window),
            "skipped": skipped,
        }
        self._open.append((row, batches))
        if self.windows.current is None:  # a step outside any batch, such as in `on_train_epoch_end`
            self.batch_ended()
        if self.follower is not None and not (skipped and batches):  # momentum moves weights without a loss
            self.follower(self.made, batches)

    def _settings_entry(self, i: int, optimizer: Optimizer) -> int:
        groups = optimizer.param_groups
        options = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in groups]
        clipping = self._clipping()
        current = id(optimizer), options, [[(id(p), p.requires_grad) for p in g["params"]] for g in groups], clipping
        last = self._settings_of.get(i)
        if last is not None and last[0] == current:
            return last[1]
        described = [
            {key: _plain(value) for key, value in of_group.items() if key != "param_names"}
            | {"parameters": [self._name_of(p) for p in group["params"]]}
            for of_group, group in zip(options, groups, strict=True)
        ]
        frozen = [self._name_of(p) for group in groups for p in group["params"] if not p.requires_grad]
        entry = {"optimizer": i, "kind": type(optimizer).__name__, "groups": described, "frozen": frozen}
        own = {"own_step": True} if has_own_step(optimizer) else {}
        self.settings.append(entry | {"clipping": clipping} | own)
        self._settings_of[i] = current, len(self.settings) - 1
        return len(self.settings) - 1

    def _clipping(self) -> dict[str, Any] | None:
        """How Lightning clips gradients; None if it does not, or in manual optimization, where clipping is not seen."""
        if not self._module.automatic_optimization:
            return None
        if self._clips_itself:
            return {"algorithm": "own", "limit": None}
        limit = self._trainer.gradient_clip_val
        algorithm = self._trainer.gradient_clip_algorithm
        return {"algorithm": str(getattr(algorithm, "value", algorithm) or "norm"), "limit": limit} if limit else None

    def _name_of(self, parameter: Tensor) -> str:
        if parameter not in self._names:  # created during the fit
            self._names = {p: clean(name) for name, p in self._module.named_parameters()}
        return self._names.get(parameter, "")  # type: ignore[call-overload]

    def _clip_coefficient(self, optimizer: Optimizer) -> Tensor | None:
        limit = self._trainer.gradient_clip_val
        if not limit or not self._module.automatic_optimization or self.clips_otherwise:
            return None
        norm = _norm_here(optimizer)
        if norm is None or self._sharded:
            return norm
        return (limit / (norm + 1e-6)).clamp(max=1.0)  # as in torch.nn.utils.clip_grad_norm_

    def _clipped_by(self, window: Window) -> Tensor | None:
        """The coefficient; of shards, whose norm only all processes know together, by how much they shrank.

        NaN where this process has no gradient, or one of 0.
        """
        if window.clip is None or not self._sharded:
            return window.clip
        norm = _norm_here(window.optimizer)
        return None if norm is None else norm / window.clip

    @property
    def clips_otherwise(self) -> bool:
        """Whether gradients are clipped other than by one coefficient for all."""
        otherwise = self._trainer.gradient_clip_algorithm not in (None, "norm")
        if self._sharded:
            otherwise |= not all(map(_keeps_gradients, self._trainer.optimizers))
        return bool((self._trainer.gradient_clip_val and otherwise) or self._clips_itself)


def _keeps_gradients(optimizer: Optimizer) -> bool:
    """Whether gradients are after a step what they were before it, as they are not where torch adds Nesterov's term."""
    known = type(optimizer).__name__ in ("SGD", "Adam", "AdamW")
    return known and not any(group.get("nesterov") for group in optimizer.param_groups)


def _norm_here(optimizer: Optimizer) -> Tensor | None:
    """The norm of all gradients, or of the shards of them that this process has; None if there are none."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return None
    with torch.no_grad():
        here = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(here)))


def _as_now(rate: Any) -> Any:
    """A learning rate as it is now; one on a device is not waited for."""
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _plain(value: Any) -> Any:
    """Convert an optimizer option to JSON types."""
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
        "batch_idx": [micro.index for micro in window],
    }


def _by_generator(states: list[dict[str, bytes] | None]) -> list[dict[str, bytes | None] | None] | None:
    found = [None if of_batch is None else {name: of_batch.get(name) for name in GENERATORS} for of_batch in states]
    return found if any(found) else None


def batch_size(batch: Any, ids: list[list[int] | None]) -> int | None:
    """Number of examples in a micro-batch, from its ids or else its first tensor; None if neither gives it."""
    if len(ids) == 1 and ids[0] is not None:
        return len(ids[0])
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), None)
