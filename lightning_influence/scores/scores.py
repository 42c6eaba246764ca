"""`Scores`: what each training example did to each query, readable, storable, drawable and loggable."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from lightning_influence import loggers as trackers
from lightning_influence import plotting, report
from lightning_influence.plotting.example_view import Classes
from lightning_influence.plotting.normalization import Normalization
from lightning_influence.scores import figures, page, tables, tracked
from lightning_influence.scores.base import Answer, numbers, paragraph
from lightning_influence.scores.data import given_or_at_hand
from lightning_influence.scores.id_checks import BaseIds, ascending, base_of, whole_numbers
from lightning_influence.scores.ranking import Ranking, checked_top, checked_values, strongest_per_query
from lightning_influence.scores.self_scores import SelfScores
from lightning_influence.scores.topk import TopK
from lightning_influence.wording import counted


class Scores(Answer):
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
        allow_nan: Accept NaN and infinite values. A NaN is then an unknown score, which no ranking includes.
        diagnostics: Numbers by name that show how far to trust the scores, such as a solver's residual.

    Raises:
        TypeError: `values` or ids of another dtype; `settings` that JSON cannot hold; `diagnostics` not of numbers.
        ValueError: Shapes that do not fit, ids not ascending, NaN or infinite values, both or none of `values`, `top`.

    Example:
        >>> import torch
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
        diagnostics: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(train_ids, base[0], method, settings, units, notes, checkpoints, diagnostics)
        self.query_ids = ascending("query_ids", query_ids)
        query_base = base_of("query_ids", base[1], self.query_ids)
        self._ids["queries"] = self.query_ids, query_base
        if (values is None) == (top is None):
            raise ValueError("Expected either `values` or `top`, got both or neither. Leave one of them None.")
        values = None if values is None else checked_values(values, self.train_ids, self.query_ids, allow_nan)
        top = None if top is None else checked_top(top, self.train_ids, self.query_ids)
        self._ranking = Ranking(values, top, self.train_ids, self.query_ids, self._train_base, query_base, allow_nan)

    @property
    def values(self) -> Tensor:
        """[query, train] scores on the CPU.

        Raises:
            RuntimeError: Only the strongest scores of each query were kept.
        """
        return self._ranking.matrix

    @property
    def top_k(self) -> int | None:
        """How many proponents and opponents of each query were kept; None where all scores were."""
        return None if self._ranking.top is None else self._ranking.depth

    def __len__(self) -> int:
        return self.query_ids.numel()

    @property
    def contents(self) -> str:
        """How many scores of what."""
        kept = "" if self.top_k is None else f", the {self.top_k} strongest proponents and opponents of each"
        return f"scores of {counted(len(self), 'query')} by {counted(self.train_ids.numel(), 'training example')}{kept}"

    def __repr__(self) -> str:
        return paragraph(self, strongest_per_query(self._ranking))

    def _repr_html_(self) -> str:
        return page.snippet(repr(self), self._ranking, self.album)

    def base_ids(self) -> BaseIds:
        """The ids as indices into the datasets under any `Subset`; the ids themselves where there is none."""
        train, query = self._ranking.train_base, self._ranking.query_base
        return BaseIds(self.train_ids if train is None else train, self.query_ids if query is None else query)

    def proponents(self, k: int = 5, query: int | Sequence[int] | None = None) -> TopK:
        """The k highest scores of each query, descending; among equal ones the smaller id comes first.

        Args:
            k: How many.
            query: Only of this query, [k], or of several, [query, k], by their ids; None: of all.

        Raises:
            ValueError: `k` is below 1 or above the number of scores kept per query, or `query` was not scored.
        """
        return self._ranking.asked(k, query, largest=True)

    def opponents(self, k: int = 5, query: int | Sequence[int] | None = None) -> TopK:
        """The k lowest scores, most negative first: the ranking of `proponents` from the other end, which see.

        Raises:
            ValueError: `k` is below 1 or above the number of scores kept per query, or `query` was not scored.
        """
        return self._ranking.asked(k, query, largest=False)

    def group(self, ids: Sequence[int] | Tensor) -> Tensor:
        """[query] sums of the scores of some training examples: their joint influence to first order.

        Args:
            ids: Distinct training ids, in any order.

        Raises:
            TypeError: Ids that are not whole numbers, such as a mask.
            ValueError: An id that was not scored, or one that is repeated.
            RuntimeError: Only the strongest scores of each query were kept.
        """
        return self._ranking.sums(whole_numbers(ids))

    def to_batches(self, k: int | None = None) -> pa.RecordBatchReader:
        """The long table as a stream, one batch per query, so that it need not fit in memory.

        Columns: `query_id`, `train_id`, `score`, `rank` (1 is the highest score of that query), and `query_base_id`,
        `train_base_id` where they differ from the ids. Rows are ordered by query, then by rank.

        Args:
            k: Only the k strongest proponents and k strongest opponents of each query. None: all that were kept.

        Raises:
            ValueError: `k` is below 1 or above the number of scores kept per query.
        """
        return tables.long_table(self._ranking, k)

    def to_arrow(self, k: int | None = None) -> pa.Table:
        """The long table of `to_batches`, read as a whole.

        Raises:
            ValueError: `k` is below 1 or above the number of scores kept per query.
        """
        return self.to_batches(k).read_all()

    def save(self, path: str | os.PathLike[str], overwrite: bool = False, **shown: Any) -> Path:
        """Write the scores into one Arrow file, one row per query; see `arrow.write_file` for what it raises.

        Args:
            path: The file.
            overwrite: Replace an existing file.
            shown: Arguments of `report`: `train`, `queries`, `render`, `labels`, `predictions`, `columns`,
                `normalization`, `megabytes`, `k`. With any of these the file also keeps what the strongest examples
                look like.

        Raises:
            TypeError: Another argument in `shown`.
            ValueError: Arguments in `shown`, but no data to show.
        """
        if shown:
            order = page.train_order(self._ranking, self.units, min(shown.get("k", 20), self._ranking.depth))
            self.album = page.album_to_keep(self, (order, self.query_ids.tolist()), shown)
        return tables.write(self, self._ranking, path, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Map a saved file into memory: `values` are the file's pages, read and verified when they are used.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or of another kind.
        """
        given, of_ranking, album = tables.read(path)
        # The values were checked before they were saved. Reading all of them again could exceed the memory.
        made = cls(**given, allow_nan=True)
        made._ranking = replace(made._ranking, **of_ranking)
        made.album = album
        return made

    def plot(
        self,
        query: int | Sequence[int] | None = None,
        k: int = 5,
        train: Any = None,
        queries: Any = None,
        render: plotting.Render | None = None,
        labels: Classes | None = None,
        *,
        predictions: Any = None,
        columns: Sequence[str] | None = None,
        normalization: Normalization | None = None,
    ) -> tuple[Any, Any]:
        """Draw a query with its strongest proponents and opponents: images, texts, rows of a table, curves.

        Scores that were just computed have their data at hand; for loaded ones pass `train` and `queries`. Without
        data, the scores are drawn as bars.

        Args:
            query: Its id, the first one by default; several ids make one row each.
            k: How many of each, at most.
            train: The training `Dataset`, indexed by `train_ids`.
            queries: The queries' `Dataset`.
            render: Called with an example, returns a text, image, vector or dict to show; or draws (axes, example).
            labels: Names of the classes, by number.
            predictions: What was predicted for the queries, indexed by their ids: a tensor, list or dict.
            columns: Names of the numbers in a table's row.
            normalization: Mean and standard deviation to undo in images; by default those of a dataset's `Normalize`.

        Returns:
            A `matplotlib.figure.Figure` and its axes (of several queries: a list for each); no window opens.

        Raises:
            ValueError: `query` was not scored, `k` is below 1, or an example needs `render` to be drawn.
            ImportError: matplotlib is not installed.
        """
        data = given_or_at_hand(self, train, queries)
        drawing = plotting.Drawing(render, labels, columns, normalization)
        return figures.explain(self, self._ranking, query, k, data, predictions, drawing)

    def plot_classes(self, train: Any = None, queries: Any = None, labels: Classes | None = None) -> tuple[Any, Any]:
        """Draw the mean influence of the training examples of each class on the queries of each class.

        Args:
            train: Classes of the training examples ([train] integers in the order of `train_ids`), or their `Dataset`.
            queries: The same for the queries.
            labels: Names of the classes, by number.

        Returns:
            A `matplotlib.figure.Figure` and its axes.

        Raises:
            RuntimeError: Only the strongest scores of each query were kept.
            ValueError: No data are at hand and none were passed, or an example has no class.
            ImportError: matplotlib is not installed.
        """
        return figures.by_class(self, self._ranking, *given_or_at_hand(self, train, queries), labels)

    def report(  # noqa: PLR0913
        self,
        path: str | os.PathLike[str],
        *,
        k: int = 20,
        self_scores: SelfScores | None = None,
        train: Any = None,
        queries: Any = None,
        render: plotting.Render | None = None,
        labels: Classes | None = None,
        predictions: Any = None,
        columns: Sequence[str] | None = None,
        normalization: Normalization | None = None,
        megabytes: float = 15.0,
    ) -> Path:
        """Write one self-contained page on which to review training examples and what explains each query.

        The page sorts, filters and marks examples, and downloads the decisions for `read_decisions`. Examples are shown
        if the data are at hand, passed, or kept by `save(path, render=..., labels=...)`; otherwise only ids are.

        Args:
            path: The HTML file; an existing one is replaced.
            k: Proponents and opponents per query, at most.
            self_scores: Self-influence or losses of the same training examples, by which they are then sorted.
            train: The training `Dataset`, indexed by `train_ids`.
            queries: The queries' `Dataset`.
            render: As for `plot`.
            labels: Names of the classes, by number.
            predictions: What was predicted for the queries, indexed by their ids.
            columns: Names of the numbers in a table's row.
            normalization: Mean and standard deviation to undo in images; by default those of a dataset's `Normalize`.
            megabytes: How much of the file examples may take; the strongest come first, the rest are only ids.

        Raises:
            ValueError: `k` is below 1, `self_scores` are of other examples, or an example needs `render`.
            ImportError: Jinja2 is not installed.
        """
        k, own = min(k, self._ranking.depth), page.own_of(self, self_scores)
        order = page.train_order(self._ranking, self.units, k, *(one.values for one in own.values()))
        showing = report.Showing(render, labels, columns, normalization, predictions)
        album = page.album_of(self, (order, self.query_ids.tolist()), (train, queries), showing, megabytes)
        album = album.with_train(None if self_scores is None else self_scores.album)
        return report.write_page(path, page.page_of(self, self._ranking, k, own, album))

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
            name: What follows `influence/`; the method by default.
            k: Proponents and opponents per query, at most.
            metrics: Further numbers, such as `evaluate(scores, bank)`.
            drawing: Arguments of `plot`: `query` (by default a wrongly predicted one of highest loss), `train`,
                `queries`, `render`, `labels`.

        Raises:
            TypeError: `metrics` that are not numbers.
            ValueError: `k` is below 1.
        """
        more = self.diagnostics | numbers("metrics", metrics)
        if trackers.listening(loggers):
            k = min(k, self._ranking.depth)
            results = tracked.results(self, self._ranking, k, partial(self.plot, k=k), drawing)
            scalars = more | dict(results.scalars)
            trackers.log_influence(loggers, replace(results, name=name or self.method, step=step, scalars=scalars))
