"""Checks of what is asked of an `Attributor`, and which examples a method scores."""

import torch
from torch import Tensor

from lightning_influence.checks import check_integer
from lightning_influence.methods.method import Method
from lightning_influence.setting.setting import Queries, Setting


def check_arguments(top_k: object, aggregate: object, measurement: object, higher_is_better: bool) -> None:
    """Raises ValueError for other values than `score` takes."""
    check_integer("top_k", top_k, optional=True)
    if aggregate not in (None, "mean"):
        raise ValueError(f"Expected `aggregate` to be None or 'mean', got {aggregate!r}.")
    if higher_is_better and measurement is None:
        raise ValueError("Expected `measurement=` with `higher_is_better=True`, got None: lower is better for a loss.")


def queries_of(setting: Setting) -> Queries:
    """The queries of a question; raises ValueError where there are none."""
    if setting.queries is None:
        raise ValueError("Expected `queries`, got None. Pass a Dataset, a DataLoader or 'train'.")
    return setting.queries


def scored_ids(method: Method, n_train: int) -> Tensor:
    """Ids of the training examples that a method has scores for, [scored] int64."""
    ids = method.scored(n_train)
    return torch.arange(n_train) if ids is None else torch.tensor(list(ids), dtype=torch.int64)
