"""Where a run is written, and which Trainers cannot be recorded."""

import os
import tempfile
from collections.abc import Callable
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


def writable_dirpath(trainer: Any, dirpath: str | None) -> Path:
    """Return the given folder, or one next to the logger's run as for `ModelCheckpoint`, created; same on all ranks.

    Raises:
        MisconfigurationException: rank 0 cannot write to it; raised on all ranks.
    """
    if dirpath is None:
        base, parts = trainer.default_root_dir, []
        if trainer.loggers:
            logger = trainer.loggers[0]
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            base, parts = logger.save_dir or base, [str(logger.name), version]
        dirpath = os.path.join(base, *parts, "influence")
    folder = Path(trainer.strategy.broadcast(os.path.abspath(os.path.expanduser(dirpath))))

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")

    on_rank_zero(trainer, write, f"a writable folder at `{folder}`")
    return folder


def on_rank_zero(trainer: Any, write: Callable[[], Any], expected: str) -> Any:
    """Return on all ranks what `write` returns on rank 0.

    Raises:
        MisconfigurationException: rank 0 cannot write; raised on all ranks.
    """
    made = error = None
    if trainer.is_global_zero:
        try:
            made = write()
        except OSError as problem:
            error = problem.strerror or str(problem)
    made, error = trainer.strategy.broadcast((made, error))
    if error is not None:
        raise MisconfigurationException(f"Expected {expected}, got {error!r}. Pass another `dirpath=`.")
    return made
