"""Where tiles of scores go: the full matrix, the strongest few, or the sum over a group."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_influence.numerics.topk import StreamingTopK
from lightning_influence.scores import TopK


class Sink(Protocol):
    """Takes in a score matrix tile by tile."""

    def take(self, tile: Tensor, first_query: int, first_id: int) -> None:
        """Scores [query, train] of consecutive queries and training examples."""


class MatrixSink:
    """Keeps everything: [query, train], because the user asked for it."""

    def __init__(self, n_queries: int, n_train: int, dtype: torch.dtype) -> None:
        self.values = torch.empty(n_queries, n_train, dtype=dtype)

    def take(self, tile: Tensor, first_query: int, first_id: int) -> None:
        """Writes the tile in its place."""
        self.values[first_query : first_query + len(tile), first_id : first_id + tile.shape[1]] = tile

    def kept(self) -> tuple[Tensor, None]:
        """The matrix."""
        return self.values, None


class TopKSink:
    """Keeps the k strongest proponents and opponents of each query."""

    def __init__(self, n_queries: int, k: int, dtype: torch.dtype) -> None:
        self._best = StreamingTopK(n_queries, k, dtype)

    def take(self, tile: Tensor, first_query: int, first_id: int) -> None:
        """Merges the tile in.

        Raises:
            ValueError: unknown scores, which have no rank.
        """
        if bool(tile.isnan().any()):
            unknown = tile.isnan().any(0).nonzero()[:, 0] + first_id
            raise ValueError(
                f"Expected known scores for `top_k`, got NaN for training examples {unknown[:10].tolist()}. Leave "
                "`top_k` out."
            )
        self._best.update(tile, torch.arange(first_id, first_id + tile.shape[1]), first_query)

    def kept(self) -> tuple[None, tuple[TopK, TopK]]:
        """The strongest proponents and opponents."""
        high, high_ids, low, low_ids = self._best.result()
        return None, (TopK(high, high_ids), TopK(low, low_ids))


class GroupSink:
    """Sums over some training examples."""

    def __init__(self, n_queries: int, ids: Sequence[int]) -> None:
        self.total = torch.zeros(n_queries, dtype=torch.float64)
        self._ids = torch.as_tensor(ids, dtype=torch.int64)

    def take(self, tile: Tensor, first_query: int, first_id: int) -> None:
        """Adds the columns that belong to the group."""
        here = self._ids[(self._ids >= first_id) & (self._ids < first_id + tile.shape[1])] - first_id
        self.total[first_query : first_query + len(tile)] += tile[:, here.to(tile.device)].double().sum(1).cpu()


class NonFinite:
    """Collects which examples have gradients that are NaN or infinite."""

    def __init__(self) -> None:
        self.train: list[int] = []
        self.queries: list[int] = []

    def clean(self, tile: Tensor, first_query: int, first_id: int) -> bool:
        """Whether every score is finite; if not, remembers whose gradient it was."""
        finite = tile.isfinite()
        if bool(finite.all()):
            return True
        rows = ~finite.any(1)
        self.queries += [first_query + i for i in rows.nonzero()[:, 0].tolist()]
        columns = (~finite[~rows]).any(0) if bool((~rows).any()) else rows.new_zeros(tile.shape[1])
        self.train += [first_id + i for i in columns.nonzero()[:, 0].tolist()]
        return False

    def refuse(self) -> None:
        """Raises ValueError where any were met."""
        found = [
            f"{kind} {sorted(set(ids))[:10]}{' and more' if len(set(ids)) > 10 else ''}"
            for kind, ids in (("training examples", self.train), ("queries", self.queries))
            if ids
        ]
        if found:
            raise ValueError(
                f"Expected finite gradients, got NaN or infinity for {' and for '.join(found)}. Look at their inputs "
                "and losses, or leave them out (`torch.utils.data.Subset`)."
            )
