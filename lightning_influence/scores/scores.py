"""The answer: what each training example did to each query, readable, storable, drawable and loggable."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lightning_influence import loggers as trackers
from lightning_influence import report
from lightning_influence.files import arrow
from lightning_influence.numerics.topk import both_ends, top_k
from lightning_influence.scores import base as answer
from lightning_influence.scores.base import BaseIds, TopK
from lightning_influence.scores.pages import Paged
from lightning_influence.scores.self_scores import SelfScores

__all__ = ["BaseIds", "Scores", "SelfScores", "TopK"]


class Scores(Paged):
    """The influence of every training example on every query; positive means proponent.

    Args:
        values: [query, train] float32 or float64, or None where only the strongest were kept.
        top: The strongest proponents and opponents of each query, where `values` is None.
        train_ids: [train] int64, ascending: indices into the training `Dataset`. All that were scored, also with `top`.
        query_ids: [query] int64, ascending: indices into the queries' `Dataset`.
        method: Name of the method.
        settings: Its hyper-parameters, JSON-able.
        units: What one unit of a score is, in words.
        notes: What a reader must know to trust the numbers.
        checkpoints: Steps of the checkpoints that were used.
        base: Indices of `train_ids` and of `query_ids` in the datasets under a `Subset`; None where they are the same.
        allow_nan: NaN and infinite values are meant. A NaN then is an unknown score, and stands in no ranking.
        figures: Numbers that tell how far to trust the scores, by name, such as a solver's residual.

    Raises:
        TypeError: `values` or ids of another dtype; `settings` that JSON cannot hold; `figures` that are no numbers.
        ValueError: Shapes that do not fit, ids not ascending, NaN or infinite values, both or none of `values`, `top`.

    Example:
        >>> scores = Scores(torch.tensor([[0.5, -1.0, 2.0]]), None, torch.arange(3), torch.tensor([7]), method="CP")
        >>> scores.proponents(k=2).train_ids.tolist(), scores.opponents(k=1).scores.tolist()
        ([[2, 0]], [[-1.0]])
        >>> scores.group([0, 1]).tolist()
        [-0.5]
    """

    def __init__(  # noqa: PLR0913
        self,
        values: Tensor | None,
        top: tuple[TopK, TopK] | None,
        train_ids: Tensor,
        query_ids: Tensor,
        *,
        method: str,
        settings: Mapping[str, Any] | None = None,
        units: str = "loss",
        notes: Sequence[str] = (),
        checkpoints: Sequence[int] = (),
        base: tuple[Tensor | None, Tensor | None] = (None, None),
        allow_nan: bool = False,
        figures: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(train_ids, method, settings, units, notes, checkpoints, base[0], figures)
        self.query_ids = answer.ascending("query_ids", query_ids)
        self._query_base = answer.base_of("query_ids", base[1], self.query_ids)
        self._allow_nan = allow_nan
        if (values is None) == (top is None):
            raise ValueError("Expected either `values` or `top`, got both or neither. Leave one of them None.")
        self._values = None if values is None else answer.floating(values)
        self._top = None if top is None else answer.checked_top(top, len(self), self.train_ids)
        if self._values is None:
            return
        if self._values.shape != (len(self), self.train_ids.numel()):
            raise ValueError(
                f"Expected `values` to be [query, train] = {[len(self), self.train_ids.numel()]}, "
                f"got {list(self._values.shape)}."
            )
        if not allow_nan:
            answer.refuse_non_finite(self._values, self.train_ids, self.query_ids)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """[query, train] scores on the CPU.

        Raises:
            RuntimeError: Only the strongest scores of each query were kept.
        """
        if self._values is None:
            raise RuntimeError(
                f"The full matrix was not kept, only the {self.top_k} strongest proponents and opponents of each query "
                f"(`top_k={self.top_k}`). Read `proponents` and `opponents`, or score again with `top_k=None`."
            )
        return self._values

    @property
    def top_k(self) -> int | None:  # type: ignore[override]
        """How many proponents and opponents of each query were kept; None where all scores are there."""
        return None if self._top is None else self._top[0].scores.shape[1]

    def __len__(self) -> int:
        return self.query_ids.numel()

    def base_ids(self) -> BaseIds:
        """The ids as indices into the datasets under any `Subset`; the ids themselves where there is none."""
        return BaseIds(
            self.train_ids if self._train_base is None else self._train_base,
            self.query_ids if self._query_base is None else self._query_base,
        )

    def proponents(self, k: int = 5) -> TopK:
        """The k highest scores of each query, descending; among equal ones the smaller id comes first.

        Raises:
            ValueError: `k` is below 1 or beyond what there is.
        """
        return self._strongest(k, largest=True)

    def opponents(self, k: int = 5) -> TopK:
        """The k lowest scores of each query, most negative first: the ranking of `proponents` from its other end.

        Raises:
            ValueError: `k` is below 1 or beyond what there is.
        """
        return self._strongest(k, largest=False)

    def group(self, ids: Sequence[int] | Tensor) -> Tensor:
        """[query] sums of the scores of some training examples: their joint influence to first order.

        Args:
            ids: Distinct training ids, in any order.

        Raises:
            TypeError: Ids that are no whole numbers, such as a mask.
            ValueError: An id that was not scored, or one that comes twice.
            RuntimeError: Only the strongest scores of each query were kept.
        """
        wanted = answer.whole_numbers(ids)
        distinct, counts = wanted.unique(return_counts=True)
        if distinct.numel() < wanted.numel():
            twice = distinct[counts > 1].tolist()
            raise ValueError(f"Expected distinct ids in `ids`, got {twice[:5]!r} more than once.")
        columns = answer.places(self.train_ids, distinct, "ids")
        rows = max(1, answer.BLOCK // max(1, columns.numel()))
        sums = [block[:, columns].double().sum(dim=1) for block in self.values.split(rows)]
        return torch.cat(sums).to(self.values.dtype)

    def to_batches(self, k: int | None = None) -> pa.RecordBatchReader:
        """The long table as a stream, one batch a query, so that it need not fit in memory.

        Columns: `query_id`, `train_id`, `score`, `rank` (1 is the highest score of that query), and `query_base_id`,
        `train_base_id` where they differ from the ids. Rows stand by query, then by rank.

        Args:
            k: Only the k strongest proponents and k strongest opponents of each query. None: all that were kept.

        Raises:
            ValueError: `k` is below 1 or beyond what there is.
        """
        k = self.top_k if k is None else k
        ends = None if k is None else (self.proponents(k), self.opponents(k))
        kept = self.values if self._top is None else self._top[0].scores
        types = {"query_id": pa.int64(), "train_id": pa.int64(), "score": arrow.float_type(kept.dtype)}
        types["rank"] = pa.int64()
        bases = {"query_base_id": self._query_base, "train_base_id": self._train_base}
        types |= {name: pa.int64() for name, base in bases.items() if base is not None}
        return arrow.stream(types, lambda row: self._long(row, ends), len(self))

    def to_arrow(self, k: int | None = None) -> pa.Table:
        """The long table of `to_batches`, read as a whole.

        Raises:
            ValueError: `k` is below 1 or beyond what there is.
        """
        return self.to_batches(k).read_all()

    def to_pandas(self, k: int | None = None) -> Any:
        """The long table of `to_batches` as a `pandas.DataFrame`.

        Raises:
            ValueError: `k` is below 1 or beyond what there is.
            ImportError: pandas is not installed.
        """
        return arrow.to_pandas(lambda: self.to_arrow(k))

    def save(self, path: str | os.PathLike[str], overwrite: bool = False, **shown: Any) -> Path:
        """Write all of this into one Arrow file, a row a query; see `arrow.write_file` for what it raises.

        Args:
            path: The file.
            overwrite: Replace a file that is there.
            shown: As of `report`: `train`, `queries`, `render`, `labels`, `predictions`, `columns`, `normalization`,
                `megabytes`, `k`. With any of these the file also keeps what the strongest examples look like.

        Raises:
            ValueError: Something of `shown`, and no data to show.
        """
        columns = {"query_id": self.query_ids}
        if self._query_base is not None:
            columns["query_base_id"] = self._query_base
        if self._top is None:
            columns["scores"] = self.values
        else:
            for name, end in zip(("proponent", "opponent"), self._top, strict=True):
                columns[f"{name}_scores"], columns[f"{name}_ids"] = end.scores, end.train_ids
        head = self._head() | {"allow_nan": self._allow_nan}
        head |= self._kept_album(
            shown,
            lambda k=20, train=None, queries=None, megabytes=15.0, **how: self._album(
                min(k, self.top_k or self.train_ids.numel()), train, queries, None, megabytes, **how
            ),
        )
        head |= {"train_ids": arrow.pack_ids(self.train_ids), "train_base_ids": arrow.pack_ids(self._train_base)}
        return arrow.write_file(path, "scores" if self._top is None else "top_k_scores", columns, head, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Map a saved file back: `values` are the file's pages, read when they are looked at, and never copied.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or something else.
        """
        _, columns, head = arrow.read_file(path, ("scores", "top_k_scores"))
        album = head.pop("album", None)
        top = None
        if "scores" not in columns:
            best, worst = (TopK(columns[f"{e}_scores"], columns[f"{e}_ids"]) for e in ("proponent", "opponent"))
            top = (best, worst)
        base = (arrow.unpack_ids(head.pop("train_base_ids")), columns.get("query_base_id"))
        train_ids, allow_nan = arrow.unpack_ids(head.pop("train_ids")), head.pop("allow_nan")
        # What was checked when it was made is not read through once more: the file may be larger than memory.
        made = cls(columns.get("scores"), top, train_ids, columns["query_id"], **head, base=base, allow_nan=True)
        made._allow_nan = allow_nan
        made.album = None if album is None else report.Album.from_json(album)
        return made

    def log(
        self,
        loggers: Any,
        step: int | None = None,
        name: str | None = None,
        k: int = 5,
        metrics: Mapping[str, float] | None = None,
        **drawing: Any,
    ) -> None:
        """Write scalars, a histogram, a table of proponents and opponents and a figure into Lightning's loggers.

        Args:
            loggers: `trainer.loggers`, or one logger.
            step: The x-axis; `trainer.global_step` after a fit.
            name: What stands after `influence/`; the method by default.
            k: Proponents and opponents per query, fewer where there are not so many.
            metrics: Further numbers, such as `evaluate(scores, bank)`.
            drawing: For `plot`: `query`, `train`, `queries`, `render`, `labels`.

        Raises:
            TypeError: `metrics` that are no numbers.
            ValueError: `k` is below 1.
        """
        numbers = answer.numbers("metrics", metrics)
        if not trackers.listening(loggers):
            return
        k = min(k, self.top_k or self.train_ids.numel())
        scalars, histograms = trackers.of_scores(self.proponents(1).scores[:, 0], self._values)
        table = arrow.as_rows(self.to_arrow(k), side=lambda row: answer.side(row["score"]))
        texts = {"about": repr(self)}
        figures = trackers.drawn(explanation=lambda: self.plot(k=k, **drawing)[0])
        scalars = self.figures | numbers | scalars
        pages = trackers.Pages(name or self.method, step, scalars, {"scores": table}, figures, histograms, texts)
        trackers.log_influence(loggers, pages)

    def _strongest(self, k: int, largest: bool, rows: slice = slice(None)) -> TopK:
        """One end of the ranking of some queries."""
        available = self.top_k or self.train_ids.numel()
        if not 1 <= k <= available:
            what = "the number of training examples" if self._top is None else f"kept per query, `top_k={available}`"
            raise ValueError(f"Expected `k` between 1 and {available} ({what}), got {k!r}.")
        if self._top is not None:
            scores, ids = self._top[0 if largest else 1]
            return TopK(scores[rows, :k], ids[rows, :k])
        values = self.values[rows]
        if not self._allow_nan:
            return TopK(*top_k(values, self.train_ids, k, largest))
        known = values.masked_fill(values.isnan(), -torch.inf if largest else torch.inf)
        ids = top_k(known, self.train_ids, k, largest)[1]
        return TopK(values.gather(1, torch.searchsorted(self.train_ids, ids)), ids)

    def _long(self, row: int, ends: tuple[TopK, TopK] | None) -> dict[str, Tensor]:
        """The rows of one query in the long table: all of the ranking, or its two ends without what is in both."""
        if ends is None:
            scores, ids = (part[0] for part in self._strongest(self.train_ids.numel(), True, slice(row, row + 1)))
            rank = torch.arange(1, ids.numel() + 1)
        else:
            ranked = self.train_ids.numel()
            if self._allow_nan and self._values is not None:
                ranked -= int(self._values[row].isnan().sum())
            scores, ids, rank = both_ends(ranked, *(part[row] for end in ends for part in end))
        made = {"query_id": self.query_ids[row].expand(ids.numel()), "train_id": ids, "score": scores, "rank": rank}
        if self._query_base is not None:
            made["query_base_id"] = self._query_base[row].expand(ids.numel())
        if self._train_base is not None:
            made["train_base_id"] = self._train_base[torch.searchsorted(self.train_ids, ids)]
        return made
