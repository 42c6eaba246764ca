"""Where a run is written, and which Trainers cannot be recorded."""

import os
import tempfile
from pathlib import Path
from typing import Any

from lightning_influence.compat import MisconfigurationException

_UNSUPPORTED = {
    "DeepSpeedStrategy": "DeepSpeed steps inside its own engine",
    "FSDPStrategy": "FSDP shards the weights",
    "ModelParallelStrategy": "model parallelism shards the weights",
    "XLAStrategy": "XLA compiles the step",
    "SingleDeviceXLAStrategy": "XLA compiles the step",
}


def check_strategy(strategy: Any, dirpath: str | None) -> None:
    """Refuse strategies that cannot be recorded.

    Raises:
        MisconfigurationException: the strategy hides steps or weights, or spawns processes and has no `dirpath`.
    """
    for cls in type(strategy).__mro__:
        if (why := _UNSUPPORTED.get(cls.__name__)) is not None:
            raise MisconfigurationException(
                f"Expected a single device or DDP, got {type(strategy).__name__!r}: {why}, which `Influence` cannot"
                " record. Use `strategy='ddp'` or leave the callback out."
            )
    launcher = getattr(strategy, "launcher", None)
    spawns = any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(launcher).__mro__)
    if spawns and dirpath is None:
        raise MisconfigurationException(
            f"Expected `Influence(dirpath=...)` with {type(strategy).__name__!r}, got `dirpath=None`: its processes end"
            " with the fit and leave only files. Pass `dirpath=` and load it with `Trajectory.load(dirpath)`."
        )


def check_training_step(module: Any) -> None:
    """Refuse a `training_step` that fetches its batch itself.

    Raises:
        MisconfigurationException: `training_step` takes `dataloader_iter`.
    """
    code = getattr(getattr(module.training_step, "__func__", module.training_step), "__code__", None)
    if code is not None and "dataloader_iter" in code.co_varnames[: code.co_argcount]:
        raise MisconfigurationException(
            "Expected `training_step(self, batch, ...)`, got `training_step(self, dataloader_iter)`: the batch is"
            " fetched inside the step, where `Influence` does not see its examples. Take `batch` instead."
        )


def resolve_dirpath(trainer: Any, dirpath: str | None) -> Path:
    """Return the given folder, or one next to the logger's run as for `ModelCheckpoint`; the same on all ranks."""
    if dirpath is None:
        if trainer.loggers:
            logger = trainer.loggers[0]
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            base = logger.save_dir or trainer.default_root_dir
            dirpath = os.path.join(base, str(logger.name), version, "influence")
        else:
            dirpath = os.path.join(trainer.default_root_dir, "influence")
    return Path(trainer.strategy.broadcast(os.path.abspath(os.path.expanduser(dirpath))))


def check_writable(trainer: Any, dirpath: Path) -> None:
    """Create the folder and check that rank 0 can write to it.

    Raises:
        MisconfigurationException: it cannot; raised on all ranks.
    """
    error = None
    if trainer.is_global_zero:
        try:
            dirpath.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=dirpath) as probe:
                probe.write(b"0")
        except OSError as problem:
            error = problem.strerror or str(problem)
    error = trainer.strategy.broadcast(error)
    if error is not None:
        raise MisconfigurationException(
            f"Expected a writable folder at `{dirpath}`, got {error!r}. Pass another `dirpath=`."
        )
