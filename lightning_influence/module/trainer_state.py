"""What ``training_step`` sees of its Trainer while it is scored: the stage, the step and epoch, and no loggers."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from lightning_influence.module.snapshot import holding, restoring
from lightning_influence.module.trainer_answers import answers_of


@contextlib.contextmanager
def training_stage(module: Any) -> Iterator[None]:
    """Make ``trainer.training`` true: ``training_step``, or a hook on its batch, may read it."""
    state = getattr(getattr(module, "_trainer", None), "state", None)
    stages = getattr(sys.modules[type(state).__module__], "RunningStage", None)
    with holding([] if state is None else [state], "stage", stages and stages.TRAINING):
        yield


@contextlib.contextmanager
def silent_loggers(trainer: Any) -> Iterator[None]:
    """Discard what ``training_step`` writes to ``self.logger.experiment``."""
    package = type(trainer).__module__.partition(".trainer")[0]
    dummy = sys.modules.get(f"{package}.loggers.logger")
    quiet = trainer.loggers if dummy is None or not trainer.loggers else [dummy.DummyLogger()]
    with holding([trainer], "loggers", quiet):
        yield


def clock_restored(module: Any) -> contextlib.AbstractContextManager[None]:
    """Restore the Trainer's counters of steps and epochs, which ``set_clock`` may change inside."""
    return restoring(_counters(module), "completed")


def set_clock(module: Any, step: int, epoch: int) -> None:
    """Set the module's ``global_step`` and ``current_epoch``, on which a loss may depend; negative: leave it."""
    answers = answers_of(getattr(module, "_trainer", None))
    if answers is not None and step >= 0:
        answers.step = step
    counters = _counters(module)
    for counter, number in zip(counters, [epoch, *[step] * (len(counters) - 1)], strict=True) if counters else ():
        if number >= 0:
            counter.completed = number


@contextlib.contextmanager
def batch_counter_at(module: Any, batch_idx: int) -> Iterator[None]:
    """Set ``trainer.fit_loop.batch_idx`` inside: it is one less than the number of batches begun in the epoch."""
    loop = getattr(getattr(module, "_trainer", None), "fit_loop", None)
    begun = [] if loop is None else [loop.epoch_loop.batch_progress.current]
    with holding(begun, "ready", batch_idx + 1):
        yield


@contextlib.contextmanager
def clock_at(module: Any, step: int | None = None, epoch: int | None = None) -> Iterator[None]:
    """Set the module's ``global_step`` or ``current_epoch`` inside; None: leave it."""
    counters = _counters(module)
    with restoring(counters, "completed"):
        for number, of_number in ((epoch, counters[:1]), (step, counters[1:])):
            for counter in of_number if number is not None else ():
                counter.completed = number
        yield


def _counters(module: Any) -> list[Any]:
    """Lightning's counters of epochs, and of steps in automatic and manual optimization: it has no setters for them."""
    loop = getattr(getattr(module, "_trainer", None), "fit_loop", None)
    if loop is None:
        return []
    steps = loop.epoch_loop
    automatic, manual = steps.automatic_optimization.optim_progress, steps.manual_optimization.optim_step_progress
    return [loop.epoch_progress.current, automatic.optimizer.step.total, manual.total]


def detached_trainer(module: Any) -> Any:
    """A silent Trainer of the module's package on the module's device, for uses of ``self.trainer`` outside a fit."""
    for base in type(module).__mro__:
        package = base.__module__.partition(".core")[0]
        if base.__name__ == "LightningModule" and package in ("pytorch_lightning", "lightning.pytorch"):
            tensors = (*module.parameters(), *module.buffers())
            device = next((t.device for t in tensors if not t.is_meta), module.device)
            with _without_plugins(package), _without_messages(package):
                strategies = sys.modules[f"{package}.strategies"]
                return sys.modules[package].Trainer(
                    accelerator="cpu" if device.type == "cpu" else "auto",
                    strategy=strategies.SingleDeviceStrategy(device=device),
                    devices=1,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
    return None


@contextlib.contextmanager
def _without_plugins(package: str) -> Iterator[None]:
    """No callbacks of installed packages: a Trainer reads the metadata of all that there are to find them."""
    connector, name = sys.modules.get(f"{package}.trainer.connectors.callback_connector"), "_load_external_callbacks"
    found = [connector] if hasattr(connector, name) else []
    with holding(found, name, lambda group: []):
        yield


@contextlib.contextmanager
def _without_messages(package: str) -> Iterator[None]:
    """No messages of the package's loggers, whose levels stay: to set one takes a millisecond."""
    named = logging.root.manager.loggerDict.items()
    loggers = [x for name, x in named if name.startswith(package) and isinstance(x, logging.Logger)]
    with holding(loggers, "disabled", True):
        yield
