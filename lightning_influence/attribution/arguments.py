"""Checks of what is asked of an `Attributor`, and which examples a method scores."""

import torch
from torch import Tensor

from lightning_influence.checks import check_integer
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.refit import Refit
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.tracking.record import load_record
from lightning_influence.trajectory import Trajectory
from lightning_influence.types import MissingEvidence


def check_arguments(top_k: object, aggregate: object, measurement: object, higher_is_better: bool) -> None:
    """Raises ValueError for other values than `score` takes."""
    check_integer("top_k", top_k, optional=True)
    if aggregate not in (None, "mean"):
        raise ValueError(f"Expected `aggregate` to be None or 'mean', got {aggregate!r}.")
    if higher_is_better and measurement is None:
        raise ValueError("Expected `measurement=` with `higher_is_better=True`, got None: lower is better for a loss.")


def check_method(method: Method, trajectory: Trajectory | None, refit: Refit | None) -> None:
    """Check, before any work begins, that there is what a method needs.

    Raises:
        TypeError: it is no method.
        MissingEvidence: it needs a trajectory, a record of the fit or retrained models that are not there.
    """
    if not isinstance(method, Method):
        raise TypeError(f"Expected `method` to be a Method such as `TracInCP()`, got {method!r}.")
    name = method.name
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


def queries_of(setting: Setting) -> Queries:
    """The queries of a question; raises ValueError where there are none."""
    if setting.queries is None:
        raise ValueError("Expected `queries`, got None. Pass a Dataset, a DataLoader or 'train'.")
    return setting.queries


def scored_ids(method: Method, n_train: int) -> Tensor:
    """Ids of the training examples that a method has scores for, [scored] int64."""
    ids = method.scored(n_train)
    return torch.arange(n_train) if ids is None else torch.tensor(list(ids), dtype=torch.int64)
