"""How strongly each training example was trained on, from the records of optimizer steps."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lightning_influence.trajectory.columns import to_numpy
from lightning_influence.types import MissingEvidence

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class ExpectedDraws:
    """How often examples are expected to be drawn, where their order is not known.

    Args:
        share: [train]: the expected share of an example in the mean over a batch.
        per_epoch: [train]: how often it is drawn in an epoch.
        note: what a reader of scores must know about them.
    """

    share: Tensor
    per_epoch: Tensor
    note: str | None = None


def relative_draws(
    reduction: Reduction, draws: ExpectedDraws | None, weights: Tensor | None, rows: pa.Table
) -> Tensor | float:
    """The expected exposure relative to that of examples which are drawn uniformly and weigh the same, 1 or [train].

    Args:
        reduction: of the loss over a batch.
        draws: of the sampler; None: uniform.
        weights: [train], of the examples in the mean over a batch; None: all the same.
        rows: the optimizer steps.
    """
    if reduction == "sum":
        if draws is None:
            return 1.0
        sizes = [size for of_step in rows["sizes"].to_pylist() for size in of_step]
        return draws.per_epoch / draws.per_epoch.mean() if sizes and None not in sizes else draws.per_epoch
    if draws is None and weights is None:
        return 1.0
    share = weights if draws is None else draws.share if weights is None else draws.share * weights
    assert share is not None
    return share / share.mean()


def visited(
    rows: pa.Table, rates: np.ndarray, reduction: Reduction, n_train: int, weights: Tensor | None = None
) -> Tensor:
    """The exposure of each example where the batch order is known.

    Args:
        rows: the optimizer steps.
        rates: their effective learning rates, [step, group].
        reduction: of the loss over a batch.
        n_train: length of the training dataset.
        weights: [train], of the examples in the mean over a batch; None: all the same.

    Returns:
        [group, train]: the effective rates of the steps in which an example was drawn, times its weight there.

    Raises:
        ValueError: a recorded id is not an index of a dataset of ``n_train`` examples.
    """
    drawn = _drawn(rows, n_train, weights)
    share = drawn.share if reduction == "mean" else np.ones(len(drawn.ids))
    groups = range(rates.shape[1])
    found = [np.bincount(drawn.ids, weights=rates[drawn.rows, g] * share, minlength=n_train) for g in groups]
    return torch.from_numpy(np.stack(found)) if found else torch.zeros(0, n_train, dtype=torch.float64)


@dataclass(frozen=True)
class MetIndices:
    """The exposure of the training examples, apart for each index of a batch (``batch_idx``) that they were in.

    Args:
        indices: of the batches, [visit]; ascending.
        ids: of the examples, [visit]; ascending for each index.
        weights: [group, visit]; their sum over an example's visits is its exposure.
    """

    indices: Tensor
    ids: Tensor
    weights: Tensor


def visits(
    rows: pa.Table, rates: np.ndarray, reduction: Reduction, n_train: int, weights: Tensor | None = None
) -> MetIndices:
    """As ``visited``, apart for each index of a batch, which must be known."""
    drawn = _drawn(rows, n_train, weights)
    index_of_batch = to_numpy(rows["batch_idx"].combine_chunks().flatten())
    pairs, visit = np.unique(index_of_batch[drawn.batches] * n_train + drawn.ids, return_inverse=True)
    share = drawn.share if reduction == "mean" else np.ones(len(drawn.ids))
    groups = range(rates.shape[1])
    found = [np.bincount(visit, weights=rates[drawn.rows, g] * share, minlength=len(pairs)) for g in groups]
    stacked = torch.from_numpy(np.stack(found)) if found else torch.zeros(0, len(pairs), dtype=torch.float64)
    return MetIndices(torch.from_numpy(pairs // n_train), torch.from_numpy(pairs % n_train), stacked)


@dataclass(frozen=True)
class _Drawn:
    """All examples in their order of training: ids, [example], and the row, micro-batch and share of each."""

    ids: np.ndarray
    rows: np.ndarray
    batches: np.ndarray
    share: np.ndarray


def _drawn(rows: pa.Table, n_train: int, weights: Tensor | None) -> _Drawn:
    micro_per_row = to_numpy(pc.list_value_length(rows["ids"]))
    micro = rows["ids"].combine_chunks().flatten()
    sizes = to_numpy(pc.list_value_length(micro))
    ids = to_numpy(micro.flatten())
    if len(ids) and (ids.min() < 0 or ids.max() >= n_train):
        worst = ids.max() if ids.max() >= n_train else ids.min()
        raise ValueError(
            f"Expected every recorded example in a dataset of length {n_train}, got index {int(worst)!r}."
            " The dataset's length changed since the fit; pass the dataset that was trained on."
        )
    row_of_id = np.repeat(np.repeat(np.arange(len(rows)), micro_per_row), sizes)
    batches = np.repeat(np.arange(len(sizes)), sizes)
    share = np.repeat(1.0 / np.maximum(sizes, 1), sizes)
    if weights is not None:
        own = weights.numpy()[ids]
        whole = np.bincount(batches, weights=own, minlength=len(sizes))[batches]
        share = np.divide(own, whole, out=np.zeros(len(ids)), where=whole != 0)
    return _Drawn(ids, row_of_id, batches, share)


def expected(rows: pa.Table, rates: np.ndarray, reduction: Reduction, n_train: int, batches: int | None) -> Tensor:
    """The expected exposure of each example where the batch order is unknown: the same for all.

    Args:
        rows: the optimizer steps.
        rates: their effective learning rates, [step, group].
        reduction: of the loss over a batch.
        n_train: length of the training dataset.
        batches: batches per epoch, where known.

    Returns:
        [group, train].

    Raises:
        MissingEvidence: the batch sizes are required and unknown.
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
            "A loss that sums over its batch needs the batch sizes, which this fit did not capture. Pass the training"
            " DataLoader as `Attributor(train=)`, or `batches_per_epoch=` to `Trajectory.exposure`."
        )
    total = torch.from_numpy((rates * np.asarray(weight).reshape(-1, 1)).sum(0))
    return total[:, None].repeat(1, n_train)
