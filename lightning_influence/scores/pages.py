"""Scores as a page to review, as what a file keeps for it, and as a few lines in a notebook."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence import report
from lightning_influence.plotting.example_view import Classes, Normalization
from lightning_influence.report import Album
from lightning_influence.scores import base as answer
from lightning_influence.scores.figures import Shown
from lightning_influence.scores.self_scores import SelfScores

_FIRST = 2000  # training examples that go into an album before those that explain queries


class Paged(Shown):
    """What `Scores` makes of itself for a browser."""

    _values: Tensor | None

    def report(  # noqa: PLR0913
        self,
        path: str | os.PathLike[str],
        *,
        k: int = 20,
        self_scores: SelfScores | None = None,
        train: Any = None,
        queries: Any = None,
        render: Callable[[Any], Any] | None = None,
        labels: Classes | None = None,
        predictions: Any = None,
        columns: Sequence[str] | None = None,
        normalization: Normalization | None = None,
        megabytes: float = 15.0,
    ) -> Path:
        """Write one self-contained page on which to review training examples and what explains each query.

        It sorts, filters and marks, and downloads what was marked; `read_decisions` reads that back. Examples are shown
        where the data are at hand, passed, or kept by `save(path, render=..., labels=...)`; otherwise their ids are.

        Args:
            path: The HTML file, replaced where it is there.
            k: Proponents and opponents per query, fewer where there are not so many.
            self_scores: Self-influence of the same training examples; they are then sorted by it.
            train: The training `Dataset`, indexed by `train_ids`.
            queries: The queries' `Dataset`.
            render: Called with an example; returns what to show of it: a text, an image, a vector or a dict of them.
            labels: Names of the classes, by number.
            predictions: What was predicted for the queries, indexed by their ids.
            columns: Names of the numbers in a table's row.
            normalization: Mean and standard deviation to undo in images; a dataset's own `Normalize` is found.
            megabytes: What examples may take in the file; the strongest come first, the rest are ids.

        Returns:
            The path.

        Raises:
            ValueError: `k` is below 1, `self_scores` are of other examples, or an example can only be shown by
                `render`.
            ImportError: Jinja2 is not installed.
        """
        k = min(k, self.top_k or self.train_ids.numel())
        if self_scores is not None and not torch.equal(self_scores.train_ids, self.train_ids):
            raise ValueError(
                f"Expected `self_scores` of the same {self.train_ids.numel()} training examples, got "
                f"{self_scores.train_ids.numel()} others. Compute both from one attributor."
            )
        how = {"render": render, "labels": labels, "predictions": predictions}
        how |= {"columns": columns, "normalization": normalization}
        album = self._album(k, train, queries, self_scores, megabytes, **how)
        total = "Influence on all queries" if self.top_k is None else "Influence on all queries (of the scores kept)"
        shown = {} if self_scores is None else {"Self-influence": self_scores.values}
        page = report.Page(
            title=f"{self.method}: {len(self.query_ids):,} queries, {len(self.train_ids):,} training examples",
            facts=self._facts(),
            units=self.units,
            train_ids=self.train_ids,
            train_base=self._train_base,
            columns=shown | {total: self._total()},
            query_ids=self.query_ids,
            query_base=self._query_base,
            pairs=self._pairs(k),
            album=album,
        )
        return report.write_page(path, page)

    def _repr_html_(self) -> str:
        k = min(3, self.top_k or self.train_ids.numel())
        rows = []
        first = slice(5)
        ends = [self._strongest(k, largest, first) for largest in (True, False)]
        for row, query in enumerate(self.query_ids[first].tolist()):
            cells = [
                ", ".join(
                    f"{self._train_name(i)} ({score:+.3g})"
                    for i, score in zip(end.train_ids[row].tolist(), end.scores[row].tolist(), strict=True)
                    if score * sign > 0
                )
                for sign, end in zip((1, -1), ends, strict=True)
            ]
            rows.append([self._query_name(query), *cells])
        return report.snippet(repr(self), ["query", "strongest proponents", "strongest opponents"], rows)

    def _album(
        self, k: int, train: Any, queries: Any, self_scores: SelfScores | None, megabytes: float, **how: Any
    ) -> Album:
        """What the examples look like: kept ones where no data are given, otherwise looked at now."""
        if self.album is not None and train is None and queries is None and how.get("render") is None:
            return self.album
        orders = (self._train_order(k, self_scores), self.query_ids.tolist())
        return self._collect((train, queries), orders, megabytes, **how)

    def _train_order(self, k: int, self_scores: SelfScores | None) -> Iterator[int]:
        """Training examples, those to show first in front: suspicious ones, then what explains queries, by rank."""
        ranked = -self._total().nan_to_num(0.0) if self_scores is None else self_scores.values
        suspicious = self.train_ids[ranked.argsort(descending=True, stable=True)].tolist()
        ends = [self._strongest(k, largest).train_ids for largest in (True, False)]
        explaining = torch.stack(ends).permute(2, 1, 0).flatten().tolist()
        return chain(suspicious[:_FIRST], explaining, suspicious[_FIRST:])

    def _total(self) -> Tensor:
        """[train] sums over all queries, of the scores that were kept."""
        total = torch.zeros(self.train_ids.numel(), dtype=torch.float64)
        if self._values is not None:
            for block in self._values.split(max(1, answer.BLOCK // self.train_ids.numel())):
                total += block.double().nansum(dim=0)
            return total
        places, scores = self._pairs(int(self.top_k or 1))
        kept = places >= 0
        return total.index_add_(0, places[kept], scores[kept].double().nan_to_num(0.0))

    def _pairs(self, k: int) -> tuple[Tensor, Tensor]:
        """[query, 2 k] places in `train_ids` and scores of proponents and opponents; -1 where a score is neither."""
        sides = []
        for largest in (True, False):
            scores, ids = self._strongest(k, largest)
            places = torch.searchsorted(self.train_ids, ids.contiguous())
            sides.append((places.masked_fill(~(scores > 0 if largest else scores < 0), -1), scores))
        return torch.cat([side[0] for side in sides], dim=1), torch.cat([side[1] for side in sides], dim=1)
