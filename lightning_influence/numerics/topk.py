"""The k highest and lowest scores of each query, from a score matrix that is computed in tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.checks import check_integer
from lightning_influence.devices import on_host

_TIE_BLOCK = 1 << 24  # scores that are searched together for ties at the boundary: 64 MB of float32


class StreamingTopK:
    """The k highest and k lowest scores of each query, from tiles of a matrix that never exists as a whole.

    Training examples are ranked by descending score, and equal scores by ascending id. The top is the head of that
    ranking and the bottom its reversed tail, so the result does not depend on how the matrix is divided into tiles.
    Memory: O(query × k) besides the tile. Each id must appear only once per query.

    Args:
        n_queries: rows of the matrix, at least 1.
        k: how many scores to keep at either end, at least 1; all of them where there are fewer columns.
        dtype: of the kept scores; a floating type that can represent the tiles' numbers.

    Raises:
        ValueError: `n_queries` or `k` is not a positive integer.

    Example:
        >>> best = StreamingTopK(n_queries=1, k=2)
        >>> best.update(torch.tensor([[0.5, -1.0]]), torch.tensor([0, 1]))
        >>> best.update(torch.tensor([[2.0, 0.0]]), torch.tensor([2, 3]))
        >>> best.result()[1].tolist(), best.result()[3].tolist()
        ([[2, 0]], [[1, 3]])
    """

    def __init__(self, n_queries: int, k: int, dtype: torch.dtype = torch.float32) -> None:
        check_integer("n_queries", n_queries)
        check_integer("k", k)
        self.k = k
        self._dtype = dtype
        # Per row, since a tile may hold some queries only: scores and ids so far, and the number of columns.
        self._seen = torch.zeros(n_queries, dtype=torch.int64)
        self._scores = {
            largest: torch.full((n_queries, k), -torch.inf if largest else torch.inf, dtype=dtype)
            for largest in (True, False)
        }
        # Empty places lose every comparison, also with an equal score.
        worst = torch.iinfo(torch.int64)
        self._ids = {
            largest: torch.full((n_queries, k), worst.max if largest else worst.min) for largest in (True, False)
        }

    def update(self, tile: Tensor, ids: Tensor, first_query: int = 0) -> None:
        """Add the scores of more training examples.

        Args:
            tile: [query, columns] finite scores on any device, of the queries from `first_query` on.
            ids: [columns] int64, the training example of each column, in any order.
            first_query: the query of the tile's first row.

        Raises:
            ValueError: the shapes do not match, or a score is NaN or infinite.
        """
        n_queries = self._seen.numel()
        if tile.ndim != 2 or first_query < 0 or first_query + tile.shape[0] > n_queries:
            raise ValueError(
                f"Expected `tile` to be [query, columns] with rows among {n_queries} queries, "
                f"got shape {list(tile.shape)} from query {first_query!r} on."
            )
        if ids.shape != tile.shape[1:]:
            raise ValueError(f"Expected `ids` to name {tile.shape[1]} columns, got shape {list(ids.shape)}.")
        if not tile.numel():
            return
        rows = slice(first_query, first_query + tile.shape[0])
        found = {largest: _candidates(tile, ids.to(tile.device), self.k, largest) for largest in (True, False)}
        arrived = iter(on_host([part for parts in found.values() for part in parts]))
        best = {
            largest: _resolved(tile, ids, next(arrived), next(arrived), next(arrived), largest) for largest in found
        }
        # `topk` ranks NaN above everything, so a score that is not finite is the first at one of the ends.
        for scores, names in best.values():
            _refuse_non_finite(scores[:, 0], names[:, 0], first_query)
        for largest, (scores, names) in best.items():
            joint_scores = torch.cat([self._scores[largest][rows], scores.to(self._dtype)], dim=1)
            joint_ids = torch.cat([self._ids[largest][rows], names], dim=1)
            joint_scores, joint_ids = _in_order(joint_scores, joint_ids, largest)
            self._scores[largest][rows] = joint_scores[:, : self.k]
            self._ids[largest][rows] = joint_ids[:, : self.k]
        self._seen[rows] += tile.shape[1]

    def merge(self, other: StreamingTopK) -> None:
        """Add what another one kept of the same queries, from other training examples or for other rows."""
        for largest in (True, False):
            scores = torch.cat([self._scores[largest], other._scores[largest]], dim=1)
            ids = torch.cat([self._ids[largest], other._ids[largest]], dim=1)
            scores, ids = _in_order(scores, ids, largest)
            self._scores[largest], self._ids[largest] = scores[:, : self.k], ids[:, : self.k]
        self._seen += other._seen

    def result(self, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The scores and ids kept so far; `update` may be called again afterwards.

        Args:
            queries: only those of as many first queries; None: all.

        Returns:
            Scores of the top in descending order, their ids, scores of the bottom in ascending order, their ids: each
            [query, min(k, columns)], on the CPU.

        Raises:
            ValueError: not all queries were given the same number of columns, or none was given any.
        """
        seen = self._seen[:queries]
        least, most = int(seen.min()), int(seen.max())
        if least != most or most == 0:
            raise ValueError(
                f"Expected scores of the same training examples for every query, got between {least} and {most} "
                "columns. Call `update` with the missing tiles first."
            )
        kept = min(self.k, most)
        ends = (self._scores[True], self._ids[True], self._scores[False], self._ids[False])
        top, top_ids, bottom, bottom_ids = (end[:queries, :kept].clone() for end in ends)
        return top, top_ids, bottom, bottom_ids


def top_k(scores: Tensor, ids: Tensor, k: int, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k highest scores of each row in descending order (or the k lowest ascending), equal scores by ascending id.

    Args:
        scores: [query, columns].
        ids: [columns] int64, distinct.
        k: how many; all columns where there are fewer.
        largest: whether to take the highest scores; otherwise the lowest, where equal scores are by descending id.

    Returns:
        Scores and ids, each [query, min(k, columns)], on the scores' device.
    """
    ids = ids.to(scores.device)
    return _resolved(scores, ids, *_candidates(scores, ids, k, largest), largest)


def _candidates(scores: Tensor, ids: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The k best scores of each row, ids for them, and whether scores outside tie with the last of them, [query]."""
    if k >= scores.shape[1]:
        return scores, ids.expand(scores.shape), scores.new_zeros(len(scores), dtype=torch.bool)
    # One more than k shows whether scores outside tie with the boundary: only such rows need more work.
    values, index = scores.topk(k + 1, dim=1, largest=largest)
    return values[:, :k], ids[index[:, :k]], values[:, k - 1] == values[:, k]


def _resolved(
    scores: Tensor, ids: Tensor, values: Tensor, names: Tensor, tied: Tensor, largest: bool
) -> tuple[Tensor, Tensor]:
    """The candidates in their order, with the ids that come first where scores tie."""
    for rows in tied.nonzero().squeeze(1).split(max(1, _TIE_BLOCK // scores.shape[1])):
        if len(rows):
            there = rows.to(scores.device)
            parts = values[rows].to(scores.device), names[rows].to(scores.device), ids.to(scores.device)
            names[rows] = _ids_at_tie(scores[there], *parts, largest).to(names.device)
    return _in_order(values, names, largest)


def both_ends(
    ranked: int, best: Tensor, best_ids: Tensor, worst: Tensor, worst_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Join the two ends of one ranking into one list by rank, without NaN and without duplicates.

    Args:
        ranked: how many examples the ranking has.
        best: [k] scores of `best_ids`, descending.
        best_ids: [k].
        worst: [k] scores of `worst_ids`, ascending.
        worst_ids: [k].

    Returns:
        Scores, ids and ranks (1 is the highest), each [at most 2 k].
    """
    place = torch.arange(best.numel())
    rank = torch.cat([place + 1, (ranked - place).flip(0)])
    scores, ids = torch.cat([best, worst.flip(0)]), torch.cat([best_ids, worst_ids.flip(0)])
    once = ~scores.isnan()
    once[best.numel() :] &= ~torch.isin(worst_ids.flip(0), best_ids)
    return scores[once], ids[once], rank[once]


def _ids_at_tie(scores: Tensor, values: Tensor, names: Tensor, ids: Tensor, largest: bool) -> Tensor:
    """The ids of each row's best, choosing by id among the columns that tie with the score at the boundary."""
    kept = values.shape[1]
    boundary = values[:, -1:]
    limits = torch.iinfo(torch.int64)
    candidates = torch.where(scores == boundary, ids, limits.max if largest else limits.min)
    chosen = candidates.topk(kept, dim=1, largest=not largest).values
    place = torch.arange(kept, device=scores.device)
    before = (values != boundary).sum(dim=1, keepdim=True)
    return torch.where(place >= before, chosen.gather(1, (place - before).clamp(min=0)), names)


def _in_order(scores: Tensor, ids: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """Sort each row by score, then by id: the highest scores with ascending ids, or the lowest with descending ids."""
    ids, by_id = ids.sort(dim=1, descending=not largest)
    scores, by_score = scores.gather(1, by_id).sort(dim=1, descending=largest, stable=True)
    return scores, ids.gather(1, by_score)


def _refuse_non_finite(scores: Tensor, ids: Tensor, first_query: int) -> None:
    """Raise ValueError for the first row whose extreme score is NaN or infinite."""
    bad = (~scores.isfinite()).nonzero().flatten()
    if bad.numel():
        row = int(bad[0])
        raise ValueError(
            f"Expected finite scores, got {scores[row].item()!r} for query row {first_query + row} and training "
            f"example {int(ids[row])}, and in {bad.numel()} rows in all. Look at that example's loss and gradient."
        )
