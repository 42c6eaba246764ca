"""Scores with their ids, all of them or the strongest per query, and the order in which they rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_influence.numerics.topk import top_k
from lightning_influence.scores.id_checks import name_of, places, whole_numbers
from lightning_influence.scores.topk import TopK
from lightning_influence.wording import counted

_Side: TypeAlias = list[tuple[int, float]]
BLOCK = 1 << 24  # scores processed at a time: 64 MB of float32


def _trusted(rows: Tensor) -> None:
    """The check of values that no file holds."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """What `Scores` knows about every pair of a query and a training example.

    Args:
        values: [query, train] scores, or None where only the strongest were kept.
        top: Proponents and opponents, each [query, k], where `values` is None.
        train_ids: [train] int64, ascending.
        query_ids: [query] int64, ascending.
        train_base: [train] ids in the dataset under a `Subset`, where they differ.
        query_base: [query] ids in the dataset under a `Subset`, where they differ.
        allow_nan: A NaN is an unknown score, which no ranking includes.
        check: Called with rows of `values` before they are used, where they lie in a file.
    """

    values: Tensor | None
    top: tuple[TopK, TopK] | None
    train_ids: Tensor
    query_ids: Tensor
    train_base: Tensor | None
    query_base: Tensor | None
    allow_nan: bool
    check: Callable[[Tensor], None] = _trusted

    @property
    def matrix(self) -> Tensor:
        """[query, train] scores.

        Raises:
            RuntimeError: Only the strongest scores of each query were kept.
        """
        if self.values is None:
            raise RuntimeError(
                f"The full matrix was not kept, only the {self.depth} strongest proponents and opponents of each query "
                f"(`top_k={self.depth}`). Read `proponents` and `opponents`, or score again with `top_k=None`."
            )
        self.check(self.values)
        return self.values

    @property
    def matrix_if_kept(self) -> Tensor | None:
        """[query, train] scores, or None where only the strongest were kept."""
        return None if self.values is None else self.matrix

    @property
    def depth(self) -> int:
        """How many training examples can be ranked per query, from either end."""
        return self.train_ids.numel() if self.top is None else self.top[0].scores.shape[1]

    def strongest(self, k: int, largest: bool, rows: slice = slice(None)) -> TopK:
        """The k highest or lowest scores of some queries, the most extreme first.

        Raises:
            ValueError: `k` is below 1 or above `depth`.
        """
        if not 1 <= k <= self.depth:
            what = "the number of training examples" if self.top is None else f"kept per query, `top_k={self.depth}`"
            raise ValueError(f"Expected `k` between 1 and {self.depth} ({what}), got {k!r}.")
        if self.top is not None:
            scores, ids = self.top[0 if largest else 1]
            return TopK(scores[rows, :k], ids[rows, :k])
        assert self.values is not None
        values = self.values[rows]
        self.check(values)
        if not self.allow_nan:
            return TopK(*top_k(values, self.train_ids, k, largest))
        known = values.masked_fill(values.isnan(), -torch.inf if largest else torch.inf)
        ids = top_k(known, self.train_ids, k, largest)[1]
        return TopK(values.gather(1, torch.searchsorted(self.train_ids, ids)), ids)

    def asked(self, k: int, query: int | Sequence[int] | None, largest: bool) -> TopK:
        """The k strongest of all queries, [query, k], of some, or of one, [k].

        Raises:
            ValueError: A query that was not scored; `k` is below 1 or above `depth`.
        """
        if query is None:
            return self.strongest(k, largest).about(self.query_ids, self.train_ids, self.train_base)
        wanted = whole_numbers(query, "query")
        rows = places(self.query_ids, wanted, "query").tolist()
        found = [self.strongest(k, largest, slice(row, row + 1)) for row in rows]
        scores, ids = (torch.cat([getattr(one, part) for one in found]) for part in ("scores", "train_ids"))
        if torch.as_tensor(query).ndim == 0:
            return TopK(scores[0], ids[0]).about(None, self.train_ids, self.train_base)
        return TopK(scores, ids).about(wanted, self.train_ids, self.train_base)

    def sides(self, k: int, rows: slice = slice(None)) -> Iterator[tuple[int, _Side, _Side]]:
        """For each query its id, and ids and scores of the proponents and the opponents among its k strongest.

        A positive score is not an opponent, even where it is the lowest.
        """
        best, worst = self.strongest(k, True, rows), self.strongest(k, False, rows)
        for row, query in enumerate(self.query_ids[rows].tolist()):
            high = zip(best.train_ids[row].tolist(), best.scores[row].tolist(), strict=True)
            low = zip(worst.train_ids[row].tolist(), worst.scores[row].tolist(), strict=True)
            yield query, [pair for pair in high if pair[1] > 0], [pair for pair in low if pair[1] < 0]

    def sums(self, ids: Tensor) -> Tensor:
        """[query] sums over distinct training ids.

        Raises:
            ValueError: An id that was not scored, or one that is repeated.
            RuntimeError: Only the strongest scores of each query were kept.
        """
        wanted, counts = ids.unique(return_counts=True)
        repeated = wanted[counts > 1].tolist()
        if repeated:
            raise ValueError(f"Expected distinct ids in `ids`, got {repeated[:5]!r} more than once.")
        columns = places(self.train_ids, wanted, "ids")
        sums = [block[:, columns].double().sum(dim=1) for block in row_blocks(self.matrix, columns.numel())]
        return torch.cat(sums).to(self.matrix.dtype)

    def train_name(self, train_id: int) -> str:
        """A training example's id as text, with the base id where there is one."""
        return name_of(train_id, self.train_ids, self.train_base)

    def query_name(self, query_id: int) -> str:
        """A query's id as text, with the base id where there is one."""
        return name_of(query_id, self.query_ids, self.query_base)


def strongest_per_query(ranking: Ranking, first: int = 3) -> list[str]:
    """The strongest proponent and opponent of the first queries, a sentence each."""
    sentences = []
    for query, *sides in ranking.sides(1, slice(first)):
        ends = [
            f"strongest {word} {ranking.train_name(side[0][0])} ({side[0][1]:+.3g})" if side else f"no {word}"
            for word, side in zip(("proponent", "opponent"), sides, strict=True)
        ]
        sentences.append(f"Query {ranking.query_name(query)}: {', '.join(ends)}.")
    more = ranking.query_ids.numel() - first
    return [*sentences, f"And {counted(more, 'more query')}."] if more > 0 else sentences


def side(score: float) -> str:
    """The word for a score's sign."""
    return "proponent" if score > 0 else "opponent" if score < 0 else "neither"


def row_blocks(values: Tensor, width: int) -> Sequence[Tensor]:
    """Consecutive rows of `values`, as many at a time as have `BLOCK` numbers in `width` columns."""
    return values.split(max(1, BLOCK // max(1, width)))


def floating(values: Tensor) -> Tensor:
    """The scores on the CPU as contiguous float32 or float64.

    Raises:
        TypeError: They are not floating point.
    """
    if not values.dtype.is_floating_point:
        raise TypeError(f"Expected scores to be floating point, got {values.dtype}.")
    values = values.detach().cpu().contiguous()
    # Not every Arrow reader supports half precision; float32 holds all of its numbers.
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def refuse_non_finite(values: Tensor, train_ids: Tensor, query_ids: Tensor | None) -> None:
    """Raise where a score is NaN or infinite, naming the examples. `values` are [query, train]."""
    start = 0
    for block in row_blocks(values, values.shape[1]):
        bad = (~block.isfinite()).nonzero()
        if bad.numel():
            row, column = bad[0].tolist()
            query = "" if query_ids is None else f"query {int(query_ids[start + row])} and "
            names = train_ids[bad[:, 1].unique()].tolist()
            raise ValueError(
                f"Expected finite scores, got {block[row, column].item()!r} for {query}training example "
                f"{int(train_ids[column])} (training examples concerned: {names[:5]!r}"
                f"{' and more' if len(names) > 5 else ''}). Look at their losses and gradients, or pass "
                "`allow_nan=True` if they are intended."
            )
        start += len(block)


def checked_values(values: Tensor, train_ids: Tensor, query_ids: Tensor, allow_nan: bool) -> Tensor:
    """The scores as `floating` returns them.

    Raises:
        TypeError: They are not floating point.
        ValueError: They are of another shape than [query, train], or not finite without `allow_nan`.
    """
    values = floating(values)
    shape = [query_ids.numel(), train_ids.numel()]
    if list(values.shape) != shape:
        raise ValueError(f"Expected `values` to be [query, train] = {shape}, got {list(values.shape)}.")
    if not allow_nan:
        refuse_non_finite(values, train_ids, query_ids)
    return values


def checked_top(top: tuple[TopK, TopK], train_ids: Tensor, query_ids: Tensor) -> tuple[TopK, TopK]:
    """Both ends of the rankings on the CPU.

    Raises:
        TypeError: Scores that are not floating point.
        ValueError: Shapes that do not fit, ids that were not scored, or another order.
    """
    shape = [query_ids.numel(), top[0].scores.shape[-1]]
    ends = []
    for name, sign, (scores, ids) in zip(("proponents", "opponents"), (-1, 1), top, strict=True):
        if list(scores.shape) != shape or ids.shape != scores.shape or not 1 <= shape[1] <= train_ids.numel():
            raise ValueError(
                f"Expected the {name} in `top` to be scores and ids of shape [query, k] = {shape} with k from "
                f"1 to {train_ids.numel()}, got {list(scores.shape)} and {list(ids.shape)}."
            )
        places(train_ids, ids.flatten().cpu(), "top")
        end = TopK(floating(scores), ids.detach().cpu())
        if not bool((end.scores.diff(dim=1) * sign >= 0).all()):
            raise ValueError(f"Expected the {name} in `top` to be sorted, strongest first, got another order.")
        ends.append(end)
    return ends[0], ends[1]
