"""A module made silent for scoring: on its device, in full precision, and restored afterwards."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_influence.module.data_hooks import attached
from lightning_influence.module.eager import plain_checkpointing, plain_operations
from lightning_influence.module.precision import full_products, no_autocast
from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.module.snapshot import ModuleSnapshot, restoring
from lightning_influence.module.task import Loss, Task, is_half, settle, unwrapped
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
) -> Iterator[Task]:
    """Yield ``module`` as a ``Task`` on the trainer's accelerator, and restore it, also after an exception.

    Inside, the module is in eval mode, gradients are enabled, ``self.log`` and the loggers do nothing, and precision
    is full float32. Restored are the weights (the same tensors), buffers, attributes, metric states, modes,
    ``requires_grad``, the device and the random states.

    Args:
        module: a LightningModule, compiled or not.
        loss: gives per-sample losses; None for the loss of ``training_step``.
        trainer: its device, precision plugin and batch transfer are used; None for the module's own device and hooks.
        evaluate: switch to eval mode, without autocast. False keeps the modes that the submodules are in.
        fit: what the fit recorded of its Trainer, with which reads of the Trainer are answered; None: it answers them.
        datamodule: a LightningDataModule, whose batch-transfer hooks are used; None: the Trainer's, if it has one.
    """
    module = unwrapped(module)
    with isolated_random_state(), plain_operations(), plain_checkpointing(), contextlib.ExitStack() as stack:
        stack.enter_context(full_products())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        _restore_afterwards(module, stack)
        device = _enter_device(module, trainer)
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
            stack.enter_context(no_autocast())
            module.eval()
        else:  # normalisation layers update their statistics without a change of the tensors' version counters
            for buffer in module.buffers():
                buffer.data = buffer.data.clone()
        stack.callback(settle, module)
        task = Task(module, loss, device, trainer, datamodule)
        task.exact = evaluate
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


def _enter_device(module: nn.Module, trainer: Any) -> torch.device:
    """Move the module to the device of scoring, in float32 at least.

    Only ``tensor.data`` and states of metrics are replaced, which ``_restore_afterwards`` puts back.
    """
    first = next(iter((*module.parameters(), *module.buffers())), None)
    here = torch.device("cpu") if first is None else first.device
    device: torch.device = here if trainer is None else trainer.strategy.root_device
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device != device or is_half(tensor):
            tensor.data = tensor.data.to(device, torch.float32 if is_half(tensor) else tensor.dtype)
    torchmetrics: Any = sys.modules.get("torchmetrics")
    for part in module.modules() if torchmetrics is not None else ():
        if isinstance(part, torchmetrics.Metric) and part.device != device:
            part.to(device)  # their states are no buffers
    return device


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces ``self.log``, ``self.log_dict`` and ``self.print``."""


def _silence(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(type(part), "log_dict") and hasattr(type(part), "training_step"):
            for name in ("log", "log_dict", "print"):
                part.__dict__[name] = _do_nothing
