"""Collect tiles of scores: the full matrix, the strongest few, or the sum over a group."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lightning_influence.devices import wide
from lightning_influence.numerics.topk import StreamingTopK
from lightning_influence.processes import Processes
from lightning_influence.scores import TopK

# Scores that the processes exchange at once.
_SENT = 2**24


@dataclass(frozen=True)
class Share:
    """The part of a score matrix that one of several processes computes: rows, columns, or all of it.

    Args:
        queries: positions of the rows.
        train: positions of the columns.
        of: the sizes of the whole, [query, train].
    """

    queries: range
    train: range
    of: tuple[int, int]

    @property
    def divided(self) -> int | None:
        """The dimension that is divided among the processes; None: each computes everything."""
        return 0 if len(self.queries) < self.of[0] else 1 if len(self.train) < self.of[1] else None

    def tiles(self, columns: int, count: int) -> list[range]:
        """Consecutive parts of the columns, of a size or less.

        As many in each of several processes, which prepare curvatures for every part together.
        """
        ids = self.train
        if self.divided != 1:
            return [ids[start : start + columns] for start in range(0, len(ids), columns)]
        parts = math.ceil(math.ceil(self.of[1] / count) / columns)
        return [ids[len(ids) * k // parts : len(ids) * (k + 1) // parts] for k in range(parts)]

    @property
    def fraction(self) -> float:
        """The part of all scores."""
        return len(self.queries) * len(self.train) / (self.of[0] * self.of[1])


class Accumulator(Protocol):
    """Collects a score matrix tile by tile."""

    def add(self, tile: Tensor, first_query: int, first_id: int) -> None:
        """Add a tile.

        Args:
            tile: scores of consecutive queries and training examples, [query, train].
            first_query: position of the first query.
            first_id: position of the first training example among those with scores.
        """

    def merge(self, share: Share, processes: Processes) -> None:
        """Add what the other processes collected, of other queries or other training examples."""


class MatrixAccumulator:
    """Keeps the full matrix."""

    def __init__(self, n_queries: int, n_train: int, dtype: torch.dtype) -> None:
        self.values = torch.empty(n_queries, n_train, dtype=dtype)

    def add(self, tile: Tensor, first_query: int, first_id: int) -> None:
        """Write the tile to its place in the matrix."""
        self.values[first_query : first_query + len(tile), first_id : first_id + tile.shape[1]] = tile

    def merge(self, share: Share, processes: Processes) -> None:
        """Fill in the others' rows or columns, some rows at a time."""
        if share.divided == 0:
            self.values = torch.cat(processes.gathered(self.values[share.queries.start : share.queries.stop].clone()))
        elif share.divided == 1:
            columns = slice(share.train.start, share.train.stop)
            for rows in self.values.split(max(1, _SENT // max(1, self.values.shape[1]))):
                rows.copy_(torch.cat(processes.gathered(rows[:, columns].clone()), 1))

    def result(self) -> tuple[Tensor, None]:
        """The matrix, [query, train], and no strongest few."""
        return self.values, None


class TopKAccumulator:
    """Keeps the k strongest proponents and opponents of each query; ``ids`` are the training examples with scores."""

    def __init__(self, n_queries: int, k: int, dtype: torch.dtype, ids: Tensor) -> None:
        self._best = StreamingTopK(n_queries, k, dtype)
        self._ids = ids

    def add(self, tile: Tensor, first_query: int, first_id: int) -> None:
        """Keep those scores of the tile that are among the strongest so far.

        Raises:
            ValueError: unknown scores (NaN), which have no rank.
        """
        ids = self._ids[first_id : first_id + tile.shape[1]]
        if bool(tile.isnan().any()):
            unknown = ids[tile.isnan().any(0).cpu()]
            raise ValueError(
                f"Expected no unknown scores with `top_k`, got NaN for training examples {unknown[:10].tolist()}. "
                "Leave `top_k` out."
            )
        self._best.update(tile, ids, first_query)

    def merge(self, share: Share, processes: Processes) -> None:
        """Keep the strongest of what all processes kept."""
        if share.divided is not None:
            for rank, other in enumerate(processes.gathered(self._best)):
                if rank != processes.rank:
                    self._best.merge(other)

    def result(self, queries: int | None = None) -> tuple[None, tuple[TopK, TopK]]:
        """No matrix, and the strongest proponents and opponents; with ``queries``, of as many first ones."""
        high, high_ids, low, low_ids = self._best.result(queries)
        return None, (TopK(high, high_ids), TopK(low, low_ids))


def accumulator_of(
    top_k: int | None, n_queries: int, ids: Tensor, dtype: torch.dtype
) -> MatrixAccumulator | TopKAccumulator:
    """What collects the scores of training examples ``ids``: all of them, or the strongest ``top_k`` of each query."""
    if top_k is None:
        return MatrixAccumulator(n_queries, len(ids), dtype)
    return TopKAccumulator(n_queries, top_k, dtype, ids)


class GroupAccumulator:
    """Sums the scores of some training examples."""

    def __init__(self, n_queries: int, ids: Sequence[int]) -> None:
        self.total = torch.zeros(n_queries, dtype=torch.float64)
        self._ids = torch.as_tensor(ids, dtype=torch.int64)

    def add(self, tile: Tensor, first_query: int, first_id: int) -> None:
        """Add the scores of the group's members in this tile."""
        here = self._ids[(self._ids >= first_id) & (self._ids < first_id + tile.shape[1])] - first_id
        self.total[first_query : first_query + len(tile)] += wide(tile[:, here.to(tile.device)]).sum(1).cpu()

    def merge(self, share: Share, processes: Processes) -> None:
        """Add the others' sums."""
        if share.divided is not None:
            self.total = torch.stack(processes.gathered(self.total)).sum(0)


@dataclass
class NonFinite:
    """The examples whose gradients (or losses) are NaN or infinite, as the scores show; ids in order of discovery."""

    train: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    of: str = "gradients"

    def clean(self, tile: Tensor, first_query: int, first_id: int) -> bool:
        """Whether all scores of a tile are finite; if not, the queries or training examples at fault are stored."""
        finite = tile.isfinite()
        if bool(finite.all()):
            return True
        rows = ~finite.any(1)
        self.queries += [first_query + i for i in rows.nonzero()[:, 0].tolist()]
        columns = (~finite[~rows]).any(0) if bool((~rows).any()) else rows.new_zeros(tile.shape[1])
        self.train += [first_id + i for i in columns.nonzero()[:, 0].tolist()]
        return False

    def refuse(self, processes: Processes) -> None:
        """Raise ValueError if there were any, in any process."""
        everyone = processes.gathered((self.train, self.queries))
        found = [
            f"{kind} {sorted(ids)[:10]}{' and more' if len(ids) > 10 else ''}"
            for k, kind in enumerate(("training examples", "queries"))
            if (ids := {i for lists in everyone for i in lists[k]})
        ]
        if found:
            raise ValueError(
                f"Expected finite {self.of}, got NaN or infinity for {' and for '.join(found)}. Check their inputs and "
                "losses, or leave them out (`torch.utils.data.Subset`)."
            )
