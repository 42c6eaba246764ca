"""The examples of a fit under other numbers: those of one of several loaders, or positions among known ids."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lightning_influence.trajectory.columns import encode, to_numpy
from lightning_influence.trajectory.files import STEPS
from lightning_influence.types import MissingEvidence

if TYPE_CHECKING:
    from lightning_influence.trajectory.trajectory import Trajectory

Ids = list[list[int]] | None


def combines_loaders(steps: pa.Table) -> bool:
    """Whether batches were made of several loaders, so that ids belong to one of several datasets."""
    return len(steps) > 0 and steps["loader_ids"].null_count < len(steps)


def of_loader(trajectory: "Trajectory", index: int) -> "Trajectory":
    """See ``Trajectory.of_loader``."""
    rows = trajectory.steps["loader_ids"].to_pylist()
    count = max((len(micro) for row in rows for micro in row or ()), default=0)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        got = f"{count} loaders" if count else "one loader"
        raise ValueError(
            f"Expected the number of one of several training loaders, got {index!r} of a fit with {got}."
            " Count them from 0, in the order of the list or dict."
        )
    ids: list[Ids] = [None if row is None else [micro[index] for micro in row] for row in rows]
    known: list[Ids] = [None if row is None or any(x is None for x in row) else row for row in ids]
    sizes = [None if row is None else [len(x) for x in row] for row in known]
    steps = _with(trajectory.steps, ids=known, sizes=sizes, loader_ids=[None] * len(rows))
    note = f"These are the examples of loader {index}, one of {count} whose batches were combined."
    return replace(trajectory, steps=steps, dataset_size=None, notes=(*trajectory.notes, note))


def recorded_ids(trajectory: "Trajectory") -> Tensor:
    """[example] int64, ascending: every id that the fit trained on.

    Raises:
        MissingEvidence: the ids of some step are unknown.
    """
    if not trajectory.has_batch_order:
        raise MissingEvidence(
            "Expected a fit that recorded the id of every example, got one without. Fit with `Influence(sample_id=...)`"
            " to use `lookup=`."
        )
    flat = trajectory.steps["ids"].combine_chunks().flatten().flatten()
    return torch.from_numpy(np.unique(to_numpy(flat)).astype(np.int64))


def renumbered(trajectory: "Trajectory", ids: Tensor) -> "Trajectory":
    """The same fit with each recorded id replaced by its position in ``ids``, which is ascending."""
    known = ids.numpy()

    def positions(batches: Ids) -> Ids:
        return None if batches is None else [np.searchsorted(known, micro).tolist() for micro in batches]

    steps = _with(trajectory.steps, ids=[positions(row) for row in trajectory.steps["ids"].to_pylist()])
    return replace(trajectory, steps=steps, dataset_size=len(ids))


def _with(steps: pa.Table, **columns: Sequence[Any]) -> pa.Table:
    for name, values in columns.items():
        steps = steps.set_column(
            steps.schema.get_field_index(name), STEPS.field(name), encode(values, STEPS.field(name).type)
        )
    return steps
