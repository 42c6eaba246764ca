"""A module made silent for scoring: on its device, in full precision, and restored afterwards."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_influence.devices import current, has_float64, on_device
from lightning_influence.module.data_hooks import attached
from lightning_influence.module.eager import plain_checkpointing, plain_operations
from lightning_influence.module.precision import Precision, full_products, outside_autocast
from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.module.snapshot import ModuleSnapshot, comparing, restoring
from lightning_influence.module.task import Loss, Task, settle, unwrapped
from lightning_influence.module.trainer_answers import answering
from lightning_influence.module.trainer_reads import FitValues
from lightning_influence.module.trainer_state import clock_restored, silent_loggers


@contextlib.contextmanager
def quiet(
    module: nn.Module,
    loss: Loss | None = None,
    trainer: Any = None,
    evaluate: bool = True,
    fit: FitValues | None = None,
    datamodule: Any = None,
    precision: Precision | None = None,
) -> Iterator[Task]:
    """Yield ``module`` as a ``Task`` on the trainer's accelerator, and restore it, also after an exception.

    Inside, the module is in eval mode, gradients are enabled, ``self.log`` and the loggers do nothing. Restored are
    the weights (the same tensors), buffers, attributes, metric states, modes, ``requires_grad``, the device and the
    random states.

    Args:
        module: a LightningModule, compiled or not.
        loss: gives per-sample losses; None for the loss of ``training_step``.
        trainer: its device, precision plugin and batch transfer are used; None for the module's own device and hooks.
        evaluate: switch to eval mode, without autocast. False keeps the modes that the submodules are in.
        fit: what the fit recorded of its Trainer, with which reads of the Trainer are answered; None: it answers them.
        datamodule: a LightningDataModule, whose batch-transfer hooks are used; None: the Trainer's, if it has one.
        precision: of the user's choice; None: full float32 at least.
    """
    module = unwrapped(module)
    with isolated_random_state(), plain_operations(), plain_checkpointing(), contextlib.ExitStack() as stack:
        if precision is None or not precision.follows_tf32:
            stack.enter_context(full_products())
        precision = precision or Precision(as_written=not evaluate)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        _restore_afterwards(module, stack)
        lowers = precision.name is not None and any(t.dtype is torch.float64 for t in module.parameters())
        device = _device_of(module, trainer)
        stack.enter_context(current(device))
        _move(module, device, precision)
        if trainer is not None:
            stack.enter_context(silent_loggers(trainer))
            if hasattr(module, "_trainer") and module._trainer is None:
                module.trainer = trainer
        if datamodule is not None:
            stack.enter_context(attached(datamodule, module))
        if fit is not None:
            stack.enter_context(answering(module, fit, device))
        stack.enter_context(clock_restored(module))
        _silence(module)
        if evaluate:
            stack.enter_context(outside_autocast())
            module.eval()
        else:  # normalisation layers update their statistics without a change of the tensors' version counters
            for buffer in module.buffers():
                buffer.data = buffer.data.clone()
        stack.enter_context(comparing(module))
        stack.callback(settle, module)
        task = Task(module, loss, device, trainer, datamodule)
        task.exact, task.precision = evaluate, replace(precision, lowers=lowers)
        yield task


def _restore_afterwards(module: nn.Module, stack: contextlib.ExitStack) -> None:
    tensors = (*module.parameters(), *module.buffers())
    stack.enter_context(restoring(module.modules(), "training"))
    stack.callback(ModuleSnapshot(module, thorough=False, parameters=False).restore)
    stack.enter_context(restoring(tensors, "requires_grad"))
    stack.enter_context(restoring(tensors, "data"))
    for m in module.modules():
        if (
            isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None
        ):  # a look-up shortens the rows of its table in place
            m.weight.data = m.weight.data.clone()


def _device_of(module: nn.Module, trainer: Any) -> torch.device:
    """The device of scoring: the Trainer's, or the module's own."""
    first = next(iter((*module.parameters(), *module.buffers())), None)
    here = torch.device("cpu") if first is None else first.device
    device: torch.device = here if trainer is None else trainer.strategy.root_device
    return device


def _move(module: nn.Module, device: torch.device, precision: Precision) -> None:
    """Move the module to a device, in the type in which its weights are held.

    Only ``tensor.data``, attributes and states of metrics are replaced, which ``_restore_afterwards`` puts back.
    """
    if precision.name == "64-true" and not has_float64(device):
        raise ValueError(
            f"Expected a `precision` that the device has, got '64-true' on {device.type}, which has no float64. Use "
            "None, or a Trainer with `accelerator='cpu'`."
        )
    tensors = (*module.parameters(), *module.buffers())
    moved = [t for t in tensors if t.device != device or t.dtype != precision.held(t)]
    for tensor, value in zip(moved, on_device([t.data.to(precision.held(t)) for t in moved], device), strict=True):
        tensor.data = value
    torchmetrics: Any = sys.modules.get("torchmetrics")
    for part in module.modules() if torchmetrics is not None else ():
        if isinstance(part, torchmetrics.Metric) and part.device != device:
            part.to(device)  # their states are no buffers
    for own in map(vars, module.modules()):
        # What a LightningModule's `self.device` and `self.dtype` say; others may call something else so.
        if isinstance(own.get("_device"), torch.device) and isinstance(kind := own.get("_dtype"), torch.dtype):
            own["_device"], own["_dtype"] = device, precision.held(torch.empty(0, dtype=kind))


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces ``self.log``, ``self.log_dict`` and ``self.print``."""


def _silence(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(type(part), "log_dict") and hasattr(type(part), "training_step"):
            for name in ("log", "log_dict", "print"):
                part.__dict__[name] = _do_nothing
