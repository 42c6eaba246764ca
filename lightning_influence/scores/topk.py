"""`TopK`: the strongest training examples of queries, which print as a table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_influence.hints import Hinted
from lightning_influence.scores.words import table
from lightning_influence.wording import counted

_ROWS = 30  # of the table that is printed


class _Ends(NamedTuple):
    scores: Tensor
    train_ids: Tensor


class TopK(_Ends, Hinted):
    """The strongest training examples: scores and ids, [query, k]; of one query and of `SelfScores`: [k].

    A tuple of the two, which prints as a table. Scores are in the units of what they were taken from, ids are int64.
    `base_ids`, of the same shape, are indices into the dataset under any `Subset`; without one, the ids.
    """

    query_ids: Tensor | None = None
    base_ids: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """The same as `train_ids`."""
        return self.train_ids

    def about(self, query_ids: Tensor | None, train_ids: Tensor, train_base: Tensor | None) -> "TopK":
        """The same with the ids of the queries and, where they differ from the ids, with base ids.

        Args:
            query_ids: [query], or None for one query.
            train_ids: [train] of all that were scored, ascending.
            train_base: [train] their base ids, or None.
        """
        self.query_ids = query_ids
        self.base_ids = self.train_ids
        if train_base is not None:
            self.base_ids = train_base[torch.searchsorted(train_ids, self.train_ids.contiguous())]
        return self

    def __repr__(self) -> str:
        scores, ids = torch.atleast_2d(self.scores), torch.atleast_2d(self.train_ids)
        k = max(1, ids.shape[1])
        names, columns = ["train_id"], [ids]
        if self.base_ids is not None and not torch.equal(self.base_ids, self.train_ids):
            names, columns = [*names, "train_base_id"], [*columns, torch.atleast_2d(self.base_ids)]
        shown = len(ids) if self.scores.ndim < 2 else min(len(ids), max(1, _ROWS // k))
        many = self.scores.ndim > 1
        queries = range(len(ids)) if self.query_ids is None else self.query_ids.tolist()
        rows: list[Sequence[Any]] = []
        for row in range(shown):
            found = zip(*(column[row].tolist() for column in columns), scores[row].tolist(), strict=True)
            rows += [[queries[row], *one] if many else one for one in found]
        text = table([*(["query_id"] if many else []), *names, "score"], rows)
        left = len(ids) - shown
        return text + (f"\n  and {counted(left, 'more query')}" if left else "")

    __str__ = __repr__
