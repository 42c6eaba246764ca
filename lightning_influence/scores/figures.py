"""Scores as people look at them: in words, as figures, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence import plotting
from lightning_influence.plotting.example_view import (
    Classes,
    Normalization,
    class_name,
    normalization_of,
    plain,
)
from lightning_influence.scores import base as answer
from lightning_influence.scores.base import Answer, TopK
from lightning_influence.types import labels_in


class Shown(Answer):
    """What `Scores` shows of itself; it brings `query_ids`, `top_k`, `values` and the ranking."""

    query_ids: Tensor
    top_k: int | None
    values: Tensor
    _query_base: Tensor | None

    def _strongest(self, k: int, largest: bool, rows: slice = slice(None)) -> TopK:
        raise NotImplementedError

    def __repr__(self) -> str:
        count = self.query_ids.numel()
        kept = "" if self.top_k is None else f", the {self.top_k} strongest proponents and opponents of each"
        size = f"scores of {count:,} queries by {self.train_ids.numel():,} training examples{kept}"
        best, worst = self._strongest(1, True, slice(3)), self._strongest(1, False, slice(3))
        findings = []
        for row, query in enumerate(self.query_ids[:3].tolist()):
            ends = [
                f"strongest {word} {self._train_name(int(end.train_ids[row, 0]))} ({float(end.scores[row, 0]):+.3g})"
                if sign * float(end.scores[row, 0]) > 0
                else f"no {word}"
                for word, sign, end in (("proponent", 1, best), ("opponent", -1, worst))
            ]
            findings.append(f"Query {self._query_name(query)}: {', '.join(ends)}.")
        if count > 3:
            findings.append(f"And {count - 3:,} more queries.")
        return self._paragraph(size, findings)

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
        either the scores are bars.

        Args:
            query: Its id, the first one by default; several ids make one row each.
            k: How many of either, fewer where there are not so many.
            train: The training `Dataset`, indexed by `train_ids`.
            queries: The queries' `Dataset`.
            render: Called with (axes, example) to draw an example that is neither image, text nor vector.
            labels: Names of the classes, by number.
            predictions: What was predicted for the queries, indexed by their ids: a tensor, list or dict.
            columns: Names of the numbers in a table's row.
            normalization: Mean and standard deviation to undo in images; a dataset's own `Normalize` is found.

        Returns:
            A `matplotlib.figure.Figure` and its axes (of several queries: a list for each), known to no window;
            `figure.savefig(path)` writes it.

        Raises:
            ValueError: `query` was not scored, `k` is below 1, or an example can only be drawn by `render`.
            ImportError: matplotlib is not installed.
        """
        train = self.at_hand[0] if train is None else train
        queries = self.at_hand[1] if queries is None else queries
        found = normalization_of(queries if train is None else train) if normalization is None else normalization
        drawing = plotting.Drawing(render, labels, columns, found)
        k = min(k, self.top_k or self.train_ids.numel())
        wanted = [int(self.query_ids[0])] if query is None else [query] if isinstance(query, int) else list(query)
        if not wanted:
            raise ValueError("Expected `query` to be an id or several, got none. Leave it out for the first one.")
        cases = [self._case(int(one), k, train, queries, predictions) for one in wanted]
        if query is None or isinstance(query, int):
            return plotting.explanation(*cases[0], method=self.method, units=self.units, drawing=drawing)
        return plotting.explanations(cases, method=self.method, units=self.units, drawing=drawing)

    def plot_classes(self, train: Any = None, queries: Any = None, labels: Classes | None = None) -> tuple[Any, Any]:
        """Draw the mean influence of the training examples of each class on the queries of each class.

        Args:
            train: Classes of the training examples ([train] integers in the order of `train_ids`), or their `Dataset`.
            queries: The same of the queries.
            labels: Names of the classes, by number.

        Returns:
            A `matplotlib.figure.Figure` and its axes.

        Raises:
            RuntimeError: Only the strongest scores of each query were kept.
            ValueError: No data are at hand and none were passed, or an example has no class.
            ImportError: matplotlib is not installed.
        """
        values = self.values
        sides = []
        for name, data, hand, ids in (
            ("train", train, self.at_hand[0], self.train_ids),
            ("queries", queries, self.at_hand[1], self.query_ids),
        ):
            sides.append(_classes(name, hand if data is None else data, ids))
        (of_train, train_at), (of_query, query_at) = sides
        within_query = torch.zeros(values.shape[0], len(of_train), dtype=torch.float64)
        for start in range(0, values.shape[0], max(1, answer.BLOCK // values.shape[1])):
            block = values[start : start + max(1, answer.BLOCK // values.shape[1])].double()
            within_query[start : start + len(block)].index_add_(1, train_at, block)
        sums = torch.zeros(len(of_query), len(of_train), dtype=torch.float64).index_add_(0, query_at, within_query)
        pairs = query_at.bincount()[:, None] * train_at.bincount()
        names = [[class_name(c, labels).removeprefix("label ") for c in of] for of in (of_train, of_query)]
        return plotting.by_class(sums / pairs, *names, method=self.method, units=self.units)

    def _query_name(self, query: int) -> str:
        return answer.name_of(query, self.query_ids, self._query_base)

    def _case(self, query: int, k: int, train: Any, queries: Any, predictions: Any) -> plotting.Case:
        """One query as it is drawn."""
        row = int(answer.places(self.query_ids, torch.tensor([query]), "query"))
        sides = []
        for largest in (True, False):
            end = self._strongest(k, largest, slice(row, row + 1))
            # A positive score is no opponent, however low it stands.
            sides.append(
                [
                    plotting.Item(self._train_name(i), score, None if train is None else train[i])
                    for i, score in zip(end.train_ids[0].tolist(), end.scores[0].tolist(), strict=True)
                    if (score > 0 if largest else score < 0)
                ]
            )
        subject = plotting.Item(
            self._query_name(query),
            example=None if queries is None else queries[query],
            prediction=None if predictions is None else predictions[query],
        )
        return plotting.Case(subject, *sides)


def _classes(name: str, data: Any, ids: Tensor) -> tuple[list[Any], Tensor]:
    """The classes there are, ascending, and where among them each id stands.

    Raises:
        ValueError: There are no data, too few classes, or an example without a class.
    """
    if data is None:
        raise ValueError(f"Expected `{name}` to be a Dataset or the class of each id, got None.")
    if isinstance(data, Tensor):
        if data.shape != ids.shape:
            raise ValueError(f"Expected `{name}` to hold {ids.numel()} classes, got shape {list(data.shape)}.")
        found = data.tolist()
    else:
        found = [plain(labels_in(data[i])) for i in ids.tolist()]
    missing = [i for i, label in zip(ids.tolist(), found, strict=True) if label is None]
    if missing:
        raise ValueError(
            f"Expected every example of `{name}` to have a class, got none for {missing[:5]!r}. Pass the classes as a "
            "tensor of integers instead of the Dataset."
        )
    classes = sorted(set(found), key=lambda label: (isinstance(label, str), label))
    place = {label: at for at, label in enumerate(classes)}
    return classes, torch.tensor([place[label] for label in found])
