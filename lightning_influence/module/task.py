"""A LightningModule as a function of (weights, batch): silent, in eval mode, and restored afterwards."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_influence.devices import has_coarse_products, on_device, pinned
from lightning_influence.module.copies import Copies
from lightning_influence.module.data_hooks import transferred
from lightning_influence.module.exact_losses import exact_losses
from lightning_influence.module.kernels import Kernels, kernels_of
from lightning_influence.module.loss_tail import NO_TAIL, LossTail, find_tail
from lightning_influence.module.numbers import History, put_back
from lightning_influence.module.precision import Precision, full_products
from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.module.snapshot import ModuleSnapshot, holding
from lightning_influence.module.step import loss_in, reads_index, step_of, takes_index
from lightning_influence.module.trainer_state import batch_counter_at, set_clock, training_stage
from lightning_influence.types import Batch, clean, writable

Loss = Callable[[Any, Batch], Tensor]
"""``loss(module, batch) -> [batch]``: per-sample losses."""

# The version of the weights that each module has now, see `Task.version`.
_VERSIONS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_COUNTER = itertools.count(1)
# Snapshots that a module's tensors have yet to be restored from, and how many were taken while it trained.
_UNSETTLED: WeakKeyDictionary[nn.Module, ModuleSnapshot] = WeakKeyDictionary()
_TAKEN: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

_requires_grad = attrgetter("requires_grad")
# See `Task.tolerance`.
_TF32 = (1e-2, 1e-3)


class Task:
    """The loss of a LightningModule on a batch, at the weights that ``load`` puts in place.

    ``quiet`` makes one and restores the module afterwards.

    Args:
        module: the user's LightningModule, already silenced and in eval mode.
        loss: gives per-sample losses; None for the loss of ``training_step``.
        device: where batches are moved.
        trainer: its precision plugin and batch transfer are used; None to use the module's own hooks alone.
        datamodule: its batch-transfer hooks come before the module's; None: those of the Trainer's, if it has one.
    """

    def __init__(
        self, module: nn.Module, loss: Loss | None, device: torch.device, trainer: Any, datamodule: Any = None
    ) -> None:
        self.module, self.loss, self.device = module, loss, device
        self.trainer, self.datamodule = trainer, datamodule
        self.loaded: Set[str] = frozenset()
        """The parameters and buffers that have the values of a checkpoint."""
        self.batch_idx = 0
        """What ``training_step`` gets as the index of its batch; see ``at``."""
        self._loss_of: Callable[..., Any] = step_of(module) if loss is None else functools.partial(loss, module)
        self.takes_index = loss is None and takes_index(self._loss_of)
        """Whether the loss gets the index of its batch; ``reads_index`` says whether it reads it."""
        self._parameters = {clean(name): p for name, p in module.named_parameters()}
        self._buffers = [
            (f"{clean(name)}.{key}" if name else key, part._buffers, key)
            for name, part in module.named_modules()
            for key, _ in part._buffers.items()  # a scripted module's cannot be iterated over
        ]
        settle(module)
        self._snapshot = [self._taken()]  # shared by the tasks of one module
        self.numbers: History = {}
        """Plain attributes that the fit changed; ``load`` gives them the values that they had at its step."""
        self.exact = True
        """Whether the loss keeps its digits where the model is certain; False: it is computed as in the fit."""
        self.tail = LossTail()
        """The part of the loss after the network's last layer; found before the first pass in float32."""
        self.precision = Precision()
        """In which the module is computed; see ``in_full``."""
        self.notes: list[str] = []
        """What to say about it with the scores."""
        self.on_forward: Callable[[], Any] | None = None
        """Called after each forward pass, before the module's attributes and buffers are restored."""

    @property
    def reads_index(self) -> bool:
        """Whether the loss may depend on the index of its batch, as far as its code shows."""
        return self.takes_index and reads_index(self._loss_of)

    def measuring(self, loss: Loss) -> "Task":
        """The same module with another loss; both tasks share their weights, also after a later ``load``."""
        other = Task(self.module, loss, self.device, self.trainer, self.datamodule)
        other._snapshot, other.numbers, other.precision = self._snapshot, self.numbers, self.precision
        return other

    def of_step(self) -> "Task":
        """The same module with the loss of ``training_step``, at the same index of the batch."""
        other = type(self)(self.module, None, self.device, self.trainer)
        other.batch_idx, other.numbers, other.exact = self.batch_idx, self.numbers, self.exact
        other.precision = self.precision
        return other

    @contextlib.contextmanager
    def at(self, batch_idx: int) -> Iterator[None]:
        """Pass ``training_step`` this index of its batch inside; a step may also read it from the Trainer's loop."""
        before, self.batch_idx = self.batch_idx, batch_idx
        try:
            with batch_counter_at(self.module, batch_idx):
                yield
        finally:
            self.batch_idx = before

    # ---- weights --------------------------------------------------------------------------------------------------

    def named_parameters(self, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
        """All parameters, or those of some names, which have no wrapper prefixes; tied parameters appear once."""
        return self._parameters if names is None else {name: self._parameters[name] for name in names}

    def named_buffers(self) -> dict[str, Tensor]:
        """Every buffer by its name without wrapper prefixes; shared buffers appear once."""
        found: dict[int, tuple[str, Tensor]] = {}
        for name, owner, key in self._buffers:
            buffer = owner.get(key)
            if buffer is not None:
                found.setdefault(id(buffer), (name, buffer))
        return dict(found.values())

    def load(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], step: int = -1, epoch: int = -1
    ) -> None:
        """Replace the module's weights; ``quiet`` puts the user's own tensors (not copies) back at the end.

        Args:
            parameters: by name; parameters that are not named keep their values.
            buffers: likewise.
            step: the module's ``global_step`` from here on; negative to leave it as it is.
            epoch: the module's ``current_epoch``; likewise.
        """
        settle(self.module)
        self.loaded = parameters.keys() | buffers.keys()
        set_clock(self.module, step, epoch)
        if step >= 0:
            put_back(self.module, self.numbers, step)
        parts = ((self.named_parameters(), parameters), (self.named_buffers(), buffers))
        own = [(tensors[name], values[name]) for tensors, values in parts for name in tensors if name in values]
        arrived = on_device([value.to(tensor.dtype) for tensor, value in own], self.device)
        for (tensor, _), value in zip(own, arrived, strict=True):
            tensor.data = value if isinstance(tensor, nn.Parameter) else value.clone()
        self.weights_changed()
        self.remember()

    @property
    def version(self) -> int:
        """A number that the weights in place share with no others, whichever task of the module loaded them."""
        return _VERSIONS.get(self.module, 0)

    def weights_changed(self) -> None:
        """To be called by whoever puts other weights in place without ``load``."""
        _VERSIONS[self.module] = next(_COUNTER)

    def weights_returned(self, version: int) -> None:
        """To be called by whoever puts earlier weights back, with the version that they had."""
        _VERSIONS[self.module] = version

    def remember(self) -> None:
        """Make the module's current attributes and tensors those that are restored after each forward pass."""
        settle(self.module)
        self._snapshot[0] = self._taken()

    def restore(self) -> None:
        """Put back attributes and tensors as they were remembered, to be called by whoever changed them for a pass."""
        settle(self.module)
        self._snapshot[0].restore()

    def moved(self) -> None:
        """To be called by whoever gave parameters or buffers other memory, after ``settle``."""
        self._snapshot[0].moved()

    def settle(self) -> None:
        """Put back what the last forward pass wrote into tensors; to be called before they are replaced or read."""
        settle(self.module)

    def written_parameters(self) -> list[str]:
        """Names of the parameters that the forward pass has written into, for ``on_forward``."""
        return [clean(name) for name in self._snapshot[0].written_parameters()]

    def _taken(self) -> ModuleSnapshot:
        """A snapshot. In training, parameters are copied for snapshots 1, 2, 4, 8 ... only, to save time."""
        if not self.module.training:
            return ModuleSnapshot(self.module)
        count = _TAKEN[self.module] = _TAKEN.get(self.module, 0) + 1
        return ModuleSnapshot(self.module, thorough=count & (count - 1) == 0)

    # ---- the loss -------------------------------------------------------------------------------------------------

    def to_device(self, batch: Batch) -> Batch:
        """The batch as Lightning would pass it to ``training_step``, in containers of its own."""
        if isinstance(batch, Copies):
            return batch.with_batch(self.to_device)
        batch = tree_map(lambda leaf: copy.copy(leaf) if writable(leaf) else leaf, batch)
        batch = self.precision.of_batch(batch, self.trainer)
        batch = tree_map(lambda leaf: pinned(leaf, self.device), batch)
        module: Any = self.module
        if not hasattr(module, "_apply_batch_transfer_handler"):
            return batch
        with training_stage(module):
            return transferred(batch, module, self.datamodule, self.device)

    def __call__(self, batch: Batch) -> Tensor:
        """The loss on a batch: a scalar from ``training_step``, or [batch] from ``loss=``.

        What it changed in the module is restored: attributes at once; tensors, which its graph may have saved, before
        the next pass, or at once where there is no graph.

        Raises:
            NoLoss: there is no loss for this batch.
            TypeError: the loss is not a tensor.
            ValueError: it does not have the shape above.
        """
        if isinstance(batch, Copies):
            return batch.of_one(self(batch.batch))
        if not self.exact:
            return self._run(batch)
        tail = NO_TAIL
        if any(p.dtype is torch.float32 for p in self._parameters.values()):
            if self.tail.layers is None:
                self.tail = find_tail(lambda: self.dry_run(batch), self.module)
            tail = self.tail
        with exact_losses(), tail.in_double(self.module):
            loss = self._run(batch)
        # One after the other: a device without float64 must not get it, in the backward pass neither.
        return loss.to(tail.dtype).to(self.device) if tail.is_used else loss

    def dry_run(self, batch: Batch) -> Tensor:
        """A pass without a trace, on a copy of the batch."""
        batch = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        with torch.no_grad(), isolated_random_state(), holding([self], "on_forward", None):
            return self._run(batch)

    def _run(self, batch: Batch) -> Tensor:
        settle(self.module)
        output = None
        parameters = list(self._parameters.values())
        trained = list(map(_requires_grad, parameters))
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.precision.computing(self.module, self.device, self.trainer))
                stack.enter_context(training_stage(self.module))
                if self.device.type == "cuda" and self.kernels.recurrent:
                    # cuDNN's recurrent layers have no derivative in eval mode, and never a second one.
                    stack.enter_context(holding([torch.backends.cudnn], "enabled", False))
                output = self._loss_of(batch, self.batch_idx) if self.takes_index else self._loss_of(batch)
            if self.on_forward is not None:
                self.on_forward()
            if isinstance(output, Mapping):
                output = output.get("loss")
        finally:
            switched = self._switched(parameters, trained)
            self._snapshot[0].restore_attributes()
            _UNSETTLED[self.module] = self._snapshot[0]
            if not isinstance(output, Tensor) or not output.requires_grad:
                settle(self.module)
        if switched:
            raise ValueError(
                "Expected `training_step` to leave `requires_grad` as it is, got a step that switches it for "
                f"`{switched[0]}` (of {len(switched)} in all). Use `detach()` in the step, freeze in a hook or before "
                "the module is passed, or pass `loss=`, a callable (module, batch) -> [batch] of per-sample losses."
            )
        return loss_in(output, self.loss is not None)

    def _switched(self, parameters: list[nn.Parameter], trained: list[bool]) -> list[str]:
        """Names of the parameters that the step has frozen or unfrozen; all are put back."""
        if list(map(_requires_grad, parameters)) == trained:
            return []
        found = []
        for (name, parameter), before in zip(self._parameters.items(), trained, strict=True):
            if before != parameter.requires_grad:
                found.append(name)
            if parameter.is_leaf:
                parameter.requires_grad_(before)
        return found

    # ---- its precision --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def in_full(self) -> Iterator[None]:
        """Compute without 16 bits and TF32 inside, if the module runs so."""
        with holding([self], "precision", self.precision.full), full_products():
            yield

    @property
    def tolerance(self) -> tuple[float, float] | None:
        """Of comparisons of gradients, relative to a parameter's and to the largest entry; None: by their type."""
        return self.precision.tolerance or (_TF32 if self.has_coarse_products else None)

    @property
    def has_coarse_products(self) -> bool:
        """Whether products in float32 are rounded to TF32, as the user has set it."""
        return has_coarse_products(self.device, any(self.kernels))

    @functools.cached_property
    def kernels(self) -> Kernels:
        """Which layers with kernels of their own the module has; recurrent ones are computed without cuDNN."""
        return kernels_of(self.module)


def settle(module: nn.Module) -> None:
    """Put back what the last forward pass of a module wrote into its tensors."""
    snapshot = _UNSETTLED.pop(module, None)
    if snapshot is not None:
        snapshot.restore_tensors()


def unwrapped(module: nn.Module) -> nn.Module:
    """The LightningModule inside ``torch.compile``'s wrapper."""
    return getattr(module, "_orig_mod", module)
