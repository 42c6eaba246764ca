"""How strongly the steps of a window acted on each training example."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lightning_influence.trajectory.checkpoint import is_plain_sgd
from lightning_influence.types import MissingEvidence

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Groups:
    """All parameter groups of all optimizers, numbered through."""

    offsets: dict[int, int]  # optimizer -> flat index of its first group
    count: int
    of_parameter: dict[str, int]

    @classmethod
    def of(cls, settings: Sequence[dict[str, Any]]) -> "Groups":
        """Number the groups; where they changed during the fit, the last word counts."""
        width: dict[int, int] = {}
        for entry in settings:
            width[entry["optimizer"]] = max(width.get(entry["optimizer"], 0), len(entry["groups"]))
        offsets, count = {}, 0
        for optimizer in sorted(width):
            offsets[optimizer], count = count, count + width[optimizer]
        of_parameter = {
            name: offsets[entry["optimizer"]] + index
            for entry in settings
            for index, group in enumerate(entry["groups"])
            for name in group["parameters"]
        }
        return cls(offsets, count, of_parameter)


def gain(group: dict[str, Any]) -> float:
    """What a gradient moves the weights by in the end, per unit of learning rate."""
    sign = -1.0 if group.get("maximize") else 1.0
    momentum = group.get("momentum") or 0.0
    if not is_plain_sgd(group) or momentum == 0.0:
        return sign
    return sign * (1.0 - group["dampening"]) / (1.0 - momentum)


def pulls(rows: pa.Table, settings: Sequence[dict[str, Any]], groups: Groups) -> np.ndarray:
    """[step, group]: learning rate × gain of momentum × clip coefficient / Lightning's divisor."""
    pull = np.zeros((len(rows), groups.count))
    gains = [[gain(group) for group in entry["groups"]] for entry in settings]
    columns = (rows[name].to_pylist() for name in ("lr", "settings", "clip", "divisor"))
    for row, (rates, entry, clip, divisor) in enumerate(zip(*columns, strict=True)):
        first = groups.offsets[settings[entry]["optimizer"]]
        scale = (1.0 if clip is None else clip) / divisor
        pull[row, first : first + len(rates)] = np.multiply(rates, gains[entry][: len(rates)]) * scale
    return pull


def visited(rows: pa.Table, pull: np.ndarray, reduction: Reduction, n_train: int) -> Tensor:
    """[group, train]: the pull of the steps in which each example was drawn, times its weight there.

    Raises:
        ValueError: a recorded id is not an index of a dataset of ``n_train`` examples.
    """
    micro_per_row = pc.list_value_length(rows["ids"]).to_numpy()
    micro = rows["ids"].combine_chunks().flatten()
    sizes = pc.list_value_length(micro).to_numpy(zero_copy_only=False)
    ids = micro.flatten().to_numpy(zero_copy_only=False)
    if len(ids) and (ids.min() < 0 or ids.max() >= n_train):
        worst = ids.max() if ids.max() >= n_train else ids.min()
        raise ValueError(
            f"Expected every recorded example in a dataset of length {n_train}, got index {int(worst)!r}."
            " The dataset's length changed since the fit; pass the dataset that was trained on."
        )
    row_of_id = np.repeat(np.repeat(np.arange(len(rows)), micro_per_row), sizes)
    share = np.repeat(1.0 / np.maximum(sizes, 1), sizes) if reduction == "mean" else np.ones(len(ids))
    weights = [np.bincount(ids, weights=pull[row_of_id, g] * share, minlength=n_train) for g in range(pull.shape[1])]
    return torch.from_numpy(np.stack(weights)) if weights else torch.zeros(0, n_train, dtype=torch.float64)


def expected(rows: pa.Table, pull: np.ndarray, reduction: Reduction, n_train: int, batches: int | None) -> Tensor:
    """[group, train]: the same where it is unknown which examples were drawn, as its expectation.

    Raises:
        MissingEvidence: batch sizes are unknown and decide.
    """
    sizes = rows["sizes"].to_pylist()
    if reduction == "mean":
        weight = [len(of_step) / n_train for of_step in sizes]
    elif all(size is not None for of_step in sizes for size in of_step):
        weight = [sum(of_step) / n_train for of_step in sizes]
    elif batches is not None:
        weight = [len(of_step) / batches for of_step in sizes]
    else:
        raise MissingEvidence(
            "A loss with `reduction='sum'` needs the batch sizes, which this fit did not capture."
            " Pass `batches_per_epoch=`."
        )
    total = torch.from_numpy((pull * np.asarray(weight).reshape(-1, 1)).sum(0))
    return total[:, None].repeat(1, n_train)
