"""Checks of what is asked of an `Attributor`, and which examples a method scores."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.checks import (
    check_callable,
    check_flag,
    check_instance,
    check_integer,
    check_not_empty,
    check_path_like,
)
from lightning_influence.data.lookup import Stream
from lightning_influence.files.arrow import check_absent
from lightning_influence.methods.method import Evidence, Method, how_to_write
from lightning_influence.module.layers import sharded_parts
from lightning_influence.module.precision import check_precision
from lightning_influence.refit import Refit
from lightning_influence.scores.id_checks import whole_numbers
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.tracking.record import load_record
from lightning_influence.trajectory import Trajectory
from lightning_influence.types import MissingEvidence

AGAIN = (
    "Fit again with space on the disk, or score by final weights: `Attributor(weights='last.ckpt')`, a file of "
    "`ModelCheckpoint`, or `trajectory=None` with a module that has them."
)


def check_parts(module: Any, trajectory: object, trainer: object, refit: object, loss: object, lookup: object) -> None:
    """Check an attributor's arguments.

    Raises:
        TypeError: one of another kind, such as a class in the place of an object.
        ValueError: several processes share the module's weights.
    """
    check_instance("module", module, "named_parameters", "the LightningModule that was trained", "Pass an instance.")
    if sharded_parts(module) or any(hasattr(weight, "full_tensor") for weight in module.parameters()):
        raise ValueError(
            "Expected a module with its whole weights, got one whose weights several processes share (`fully_shard`)."
            " What its fit recorded is whole: score it in a process of its own, with a new module (whose"
            " `configure_model` calls `fully_shard` only where there is a `self.device_mesh`) and no Trainer, or one of"
            " a single device."
        )
    if trajectory is not None and not isinstance(trajectory, Trajectory):
        path = f"{str(trajectory)!r}" if isinstance(trajectory, (str, os.PathLike)) else "influence.run_dir"
        raise TypeError(
            f"Expected `trajectory` to be a Trajectory or None, got {trajectory!r}. Pass `Trajectory.load({path})`, or "
            "`Trajectory.from_checkpoints(...)` for files of Lightning's own."
        )
    if trainer is not None:
        check_instance("trainer", trainer, "strategy", "a Trainer or None", "Pass the Trainer of the fit, or leave it.")
    if refit is not None and not isinstance(refit, Refit):
        raise TypeError(f"Expected `refit` to be a Refit or None, got {refit!r}. Pass `Refit()`.")
    check_callable("loss", loss)
    check_callable("lookup", lookup)


def check_options(batch_size: object, check_data: object, precision: str | None) -> None:
    """Check an attributor's numbers and words.

    Raises:
        TypeError: one of another type.
        ValueError: a size below 1, or another word than Lightning's for a precision.
    """
    check_integer("batch_size", batch_size, optional=True)
    check_flag("check_data", check_data)
    check_precision(precision)


def check_arguments(top_k: object, aggregate: object, measurement: object, higher_is_better: bool) -> None:
    """Raises ValueError for other values than `score` takes."""
    check_integer("top_k", top_k, optional=True)
    check_callable("measurement", measurement)
    if aggregate not in (None, "mean"):
        raise ValueError(f"Expected `aggregate` to be None or 'mean', got {aggregate!r}.")
    if higher_is_better and measurement is None:
        raise ValueError("Expected `measurement=` with `higher_is_better=True`, got None: lower is better for a loss.")


def check_path(path: str | os.PathLike[str] | None) -> None:
    """Check before any work begins that scores can be saved there.

    Raises:
        TypeError: it is no path.
        FileExistsError: there is a file.
        OSError: the folder cannot be written to; ``filename`` is the path.
    """
    if path is None:
        return
    check_path_like("path", path, "Pass the file to save the scores in, such as 'scores.arrow', or None.")
    path = Path(path)
    check_absent(path)
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_method(
    method: Method,
    trajectory: Trajectory | None,
    refit: Refit | None,
    path: str | os.PathLike[str] | None = None,
) -> None:
    """Check, before any work begins, that there is what a method needs.

    Raises:
        TypeError: it is no method.
        ValueError: it visits no checkpoint.
        MissingEvidence: it needs a trajectory, a record of the fit or retrained models that are not there.
    """
    if not isinstance(method, Method):
        hint = how_to_write(method) or "The method comes first, then the queries: `score(TracInCP(), queries)`."
        raise TypeError(f"Expected `method` to be a Method such as `TracInCP()`, got {method!r}. {hint}")
    check_not_empty("checkpoints", getattr(method, "checkpoints", None))
    check_path(path)
    name = method.name
    if trajectory is not None and trajectory.broken is not None and follows_the_fit(method):
        raise MissingEvidence(
            f"`{name}` needs the record of the whole fit, got a broken one. {trajectory.broken} {AGAIN}"
        )
    if method.needs & Evidence.CHECKPOINTS and trajectory is None:
        raise MissingEvidence(
            f"`{name}` needs checkpoints with learning rates, got `trajectory=None`. Fit with "
            "`Trainer(callbacks=[Influence()])`, load files with `Trajectory.from_checkpoints(paths)`, or use "
            "`GradientDot()`, which needs only the final weights."
        )
    if method.needs & Evidence.TRACKER:
        run, last = (None, 0) if trajectory is None else (trajectory.path, trajectory.checkpoints[-1].step)
        load_record(run, method.record, last)
    if method.needs & Evidence.REFIT and refit is None:
        raise MissingEvidence(f"`{name}` retrains models, got `refit=None`. Pass `Attributor(..., refit=Refit(...))`.")


def follows_the_fit(method: Method) -> bool:
    """Whether a method uses more of the record of a fit than its final weights."""
    more = Evidence.CHECKPOINTS | Evidence.BATCH_ORDER | Evidence.TRACKER
    return bool(method.needs & more) or getattr(method, "checkpoints", None) is not None


def queries_of(setting: Setting) -> Queries:
    """The queries of a question; raises ValueError where there are none."""
    if setting.queries is None:
        raise ValueError("Expected `queries`, got None. Pass a Dataset, a DataLoader or 'train'.")
    return setting.queries


def check_batch_index(method: Method, setting: Setting) -> None:
    """Raises where the loss depends on the index of a batch, but the method does not; otherwise notes it."""
    record = bool(method.needs & Evidence.CHECKPOINTS)
    refused = None if method.follows_batch_index() else method.name
    setting.batch_index = replace(setting.batch_index, method=refused, needs_record=record)
    setting.depends_on_index(None if setting.trajectory is None else len(setting.trajectory.checkpoints) - 1)


def group_of(method: Method, given: Sequence[int], n_train: int, stream: Stream | None) -> list[int]:
    """Positions of a group of training examples; raises ValueError for those that do not exist or have no scores."""
    ids: list[int] = whole_numbers(given).tolist()
    ids = ids if stream is None else stream.positions(ids)
    if wrong := [i for i in ids if not 0 <= i < n_train]:
        raise ValueError(f"Expected `ids` from 0 to {n_train - 1}, got {wrong[:5]!r}.")
    if unscored := sorted(set(ids) - set(scored_ids(method, n_train).tolist())):
        raise ValueError(f"Expected `ids` that {method!r} has scores for, got {unscored[:5]!r}.")
    return ids


def scored_ids(method: Method, n_train: int) -> Tensor:
    """Ids of the training examples that a method has scores for, [scored] int64."""
    ids = method.scored(n_train)
    return torch.arange(n_train) if ids is None else torch.tensor(list(ids), dtype=torch.int64)
