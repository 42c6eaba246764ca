"""The examples of scores: those at hand, or a dataset that is given and must hold the examples that were scored."""

import warnings
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_influence.scores.base import Answer
from lightning_influence.types import base_indices, is_table

Data: TypeAlias = tuple[Any, Any]
"""The training dataset and the queries'; None where there is none."""


def given_or_at_hand(answer: Answer, train: Any, queries: Any) -> Data:
    """The datasets to show: the given ones, otherwise those at hand.

    Raises:
        TypeError: A table is given.
        ValueError: A dataset that is given cannot be the one that was scored, nor the one under its `Subset`.
    """
    shown = [
        here if given is None or given is here or name not in answer._ids else _scored(name, given, *answer._ids[name])
        for name, given, here in zip(("train", "queries"), (train, queries), answer.at_hand, strict=True)
    ]
    return shown[0], shown[1]


def _scored(name: str, data: Any, ids: Tensor, base: Tensor | None) -> Any:
    """A given dataset as one that is indexed by ids.

    Raises:
        TypeError: It is a table, which is indexed by columns.
        ValueError: It has too few examples, or is another `Subset`.
    """
    data = data.dataset if isinstance(data, DataLoader) else data
    if is_table(data):
        raise TypeError(
            f"Expected `{name}` to be a Dataset, got a {type(data).__name__}, which is indexed by columns. Pass the "
            "Dataset that was scored, or its rows: `frame.to_dict('records')`."
        )
    if isinstance(data, Tensor) or not hasattr(data, "__len__") or isinstance(data, dict):
        return data
    count, last = len(data), int(ids[-1])
    if count <= last:
        raise ValueError(
            f"Expected `{name}` to hold the examples that were scored, of which the last has the id {last}, got "
            f"{count}. Pass the dataset that was scored."
        )
    held = base_indices(data)
    if base is None:
        return data
    if held is not None:
        if not torch.equal(held[ids], base):
            wrong = int(ids[held[ids] != base][0])
            raise ValueError(
                f"Expected `{name}` to be the Subset that was scored, got another: its example {wrong} is "
                f"{int(held[wrong])} of the dataset under it, and {int(base[ids == wrong])} was scored. Split with the "
                "same seed, or pass the dataset under the Subset."
            )
        return data
    if count <= int(base.max()):
        return data  # a copy of the Subset
    if count == last + 1:
        warnings.warn(
            f"`{name}` is as long as the Subset that was scored and as the dataset under it, and is taken for the "
            "former. If it is the latter, pass the Subset.",
            stacklevel=2,
        )
        return data
    places = base[0].repeat(last + 1)
    places[ids] = base
    return Subset(data, places.tolist())
