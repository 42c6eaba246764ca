"""Where a run is written, and which Trainers cannot be recorded."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_influence.compat import MisconfigurationException, rank_zero_warn

_UNSUPPORTED = {
    "DeepSpeedStrategy": "DeepSpeed steps inside its own engine",
    "FSDPStrategy": "FSDP shards the weights in its own wrapper",
    "XLAStrategy": "XLA compiles the step",
    "SingleDeviceXLAStrategy": "XLA compiles the step",
}


class CannotRecord(RuntimeError):
    """A fit cannot be recorded, for a reason that its user can change; the fit itself goes on."""


def check_strategy(strategy: Any, dirpath: str | None) -> None:
    """Refuse strategies that cannot be recorded.

    Raises:
        CannotRecord: the strategy hides steps or weights, or spawns processes and has no `dirpath`.
    """
    for cls in type(strategy).__mro__:
        if (why := _UNSUPPORTED.get(cls.__name__)) is not None:
            raise CannotRecord(
                f"Expected a single device, DDP or FSDP 2, got {type(strategy).__name__!r}: {why}, which `Influence`"
                " cannot record. Use `strategy='ddp'` or `ModelParallelStrategy` with `fully_shard`, or leave the"
                " callback out and pass a whole `.ckpt` file to `Attributor(weights=)`."
            )
    if shards_weights(strategy):
        _check_sharding(strategy)
    launcher = getattr(strategy, "launcher", None)
    spawns = any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(launcher).__mro__)
    if spawns and dirpath is None:
        raise CannotRecord(
            f"Expected `Influence(dirpath=...)` with {type(strategy).__name__!r}, got `dirpath=None`: its processes end"
            " with the fit and leave only files. Pass `dirpath=` and load it with `Trajectory.load(dirpath)`."
        )


def shards_weights(strategy: Any) -> bool:
    """Whether processes share the weights (FSDP 2), so that none has all of them."""
    return any(cls.__name__ == "ModelParallelStrategy" for cls in type(strategy).__mro__)


def _check_sharding(strategy: Any) -> None:
    if not strategy.lightning_module.automatic_optimization:
        raise CannotRecord(
            "Expected automatic optimization where several processes share the weights, got manual optimization, which"
            " `Influence` does not follow there. Use `strategy='ddp'` or leave the callback out."
        )
    count, parts = strategy.world_size, strategy.distributed_sampler_kwargs["num_replicas"]
    if parts != count:
        raise CannotRecord(
            f"Expected each of the {count} processes to train on examples of its own, got {parts} parts of the data:"
            f" tensor parallelism is not recorded. Use `ModelParallelStrategy(data_parallel_size={count},"
            " tensor_parallel_size=1)` or leave the callback out."
        )


def check_training_step(module: Any) -> None:
    """Refuse a `training_step` that fetches its batch itself.

    Raises:
        CannotRecord: `training_step` takes `dataloader_iter`.
    """
    code = getattr(getattr(module.training_step, "__func__", module.training_step), "__code__", None)
    if code is not None and "dataloader_iter" in code.co_varnames[: code.co_argcount]:
        raise CannotRecord(
            "Expected `training_step(self, batch, ...)`, got `training_step(self, dataloader_iter)`: the batch is"
            " fetched inside the step, where `Influence` does not see its examples. Take `batch` instead."
        )


def local_path(path: str) -> str | None:
    """The path without `file://`; None for a URL of another file system, such as `s3://bucket/runs`."""
    path = re.sub(r"^(file|local)://", "", path)
    return None if re.match(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)", path) else path


def check_dirpath(dirpath: str | None) -> None:
    """Refuse a `dirpath` that is no local folder.

    Raises:
        MisconfigurationException: it is a URL of another file system.
    """
    if dirpath is not None and local_path(dirpath) is None:
        raise MisconfigurationException(
            f"Expected `dirpath` to be a local folder, got {dirpath!r}: a run is read and extended while the fit goes"
            " on, which needs a file system with atomic renames. Pass a local `dirpath=` and copy it after the fit;"
            " `Trajectory.load` reads a copy."
        )


def writable_dirpath(trainer: Any, dirpath: str | None) -> Path:
    """Return the given folder, or one next to the logger's run as for `ModelCheckpoint`; the same on all ranks.

    It is not created yet: a Trainer that only tunes leaves nothing behind. Where the logger's run is no local folder,
    it is `influence` in the current directory.

    Raises:
        CannotRecord: rank 0 cannot write to it; raised on all ranks.
    """

    def find() -> str:
        given = _default_dirpath(trainer) if dirpath is None else dirpath
        found = local_path(given)
        if found is None:
            found = "influence"
            rank_zero_warn(
                f"`Influence` writes to {os.path.abspath(found)!r}, since {given!r} is no local folder. Choose another"
                " with `Influence(dirpath=...)`."
            )
        folder = os.path.abspath(os.path.expanduser(found))
        _probe(Path(folder))
        return folder

    return Path(on_rank_zero(trainer, find, "a writable folder"))


def _default_dirpath(trainer: Any) -> str:
    base, parts = trainer.default_root_dir, []
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        base, parts = logger.save_dir or base, [str(logger.name), version]
    return os.path.join(base, *parts, "influence")


def _probe(folder: Path) -> None:
    """Write a temporary file where the folder is or, as long as it is not, where it will be created."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"0")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def on_rank_zero(trainer: Any, write: Callable[[], Any], expected: str) -> Any:
    """Return on all ranks what `write` returns on rank 0.

    Raises:
        CannotRecord: rank 0 cannot write; raised on all ranks.
    """
    made = error = None
    if trainer.is_global_zero:
        try:
            made = write()
        except OSError as problem:
            place = f" at `{problem.filename}`" if problem.filename else ""
            error = f"Expected {expected}{place}, got {problem.strerror or str(problem)!r}. Pass another `dirpath=`."
        except Exception as problem:  # the other ranks are waiting for an answer
            error = f"Expected {expected}, got {type(problem).__name__}: {problem}. Pass another `dirpath=`."
    made, error = trainer.strategy.broadcast((made, error))
    if error is not None:
        raise CannotRecord(error)
    return made
