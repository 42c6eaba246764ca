"""Scores as pictures: a query with its proponents and opponents, and the influence of classes on classes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence import plotting
from lightning_influence.plotting.example_view import Classes, ViewOptions, class_name, label_of, plain
from lightning_influence.report import Opinion
from lightning_influence.scores.base import Answer
from lightning_influence.scores.data import Data
from lightning_influence.scores.id_checks import places
from lightning_influence.scores.ranking import Ranking, row_blocks
from lightning_influence.scores.topk import TopK
from lightning_influence.wording import counted

_Query: TypeAlias = int | Sequence[int] | None


def explain(
    answer: Answer, ranking: Ranking, query: _Query, k: int, data: Data, predictions: Any, drawing: plotting.Drawing
) -> tuple[Any, Any]:
    """Draw one query, or one row per query, with its k strongest proponents and opponents.

    Args:
        answer: Its method and units are written.
        ranking: The scores.
        query: Id or ids; None is the first query.
        k: How many of each, at most.
        data: The training examples and the queries, each None where its ids are drawn instead.
        predictions: What was predicted for the queries, by id.
        drawing: How examples are drawn.

    Raises:
        ValueError: `query` is empty or was not scored, `k` is below 1, or an example cannot be drawn without `render`.
    """
    train, queries = data
    train, queries = _shown(answer, "train", train), _shown(answer, "queries", queries)
    wanted = (
        ranking.query_ids[:1].tolist()
        if query is None
        else [query]
        if isinstance(query, int)
        else [int(one) for one in query]
    )
    if not wanted:
        raise ValueError("Expected `query` to be an id or several, got none. Leave it out for the first one.")
    k = min(k, ranking.depth)
    items = _items_of(answer, ranking, wanted, queries, predictions)
    drawing = replace(answer.viewed(drawing).suited_to(train, queries), targets=any(_is_number(item) for item in items))
    cases = [_case(ranking, query, item, k, train) for query, item in zip(wanted, items, strict=True)]
    if query is None or isinstance(query, int):
        return plotting.explanation(cases[0], method=answer.method, units=answer.units, drawing=drawing)
    return plotting.explanations(cases, method=answer.method, units=answer.units, drawing=drawing)


def by_class(answer: Answer, ranking: Ranking, train: Any, queries: Any, labels: Classes | None) -> tuple[Any, Any]:
    """Draw the mean score of each pair of a training class and a query class.

    Args:
        answer: Its method and units are written.
        ranking: The scores.
        train: The class of each training example as a tensor, or their `Dataset`.
        queries: The same for the queries.
        labels: Names of the classes, by number.

    Raises:
        RuntimeError: Only the strongest scores of each query were kept.
        ValueError: There are no data, or an example without a class.
    """
    values = ranking.matrix
    of_train, train_at = _classes("train", train, ranking.train_ids)
    of_query, query_at = _classes("queries", queries, ranking.query_ids)
    within_query = torch.zeros(len(values), len(of_train), dtype=torch.float64)
    width = values.shape[1]
    for sums, block in zip(row_blocks(within_query, width), row_blocks(values, width), strict=True):
        sums.index_add_(1, train_at, block.double())
    total = torch.zeros(len(of_query), len(of_train), dtype=torch.float64).index_add_(0, query_at, within_query)
    pairs = query_at.bincount()[:, None] * train_at.bincount()
    view = answer.viewed(ViewOptions(labels=labels)).named_by(
        *(None if isinstance(data, Tensor) else data for data in (train, queries))
    )
    names = [[class_name(c, view.labels).removeprefix("label ") for c in of] for of in (of_train, of_query)]
    return plotting.by_class(total / pairs, *names, method=answer.method, units=answer.units)


def highest(answer: Answer, title: str, top: TopK, train: Any, drawing: plotting.Drawing) -> tuple[Any, list[Any]]:
    """Draw the training examples of highest scores, with their classes and what the model predicts for them.

    Args:
        answer: Its method is written, and its opinions.
        title: What the scores are, in words.
        top: The examples, highest first.
        train: The training examples.
        drawing: How examples are drawn.

    Raises:
        ValueError: There are no data, or an example cannot be drawn without `render`.
    """
    train, drawing = _shown(answer, "train", train), answer.viewed(drawing)
    if train is None:
        raise ValueError("Expected `train` to be the training Dataset, got None, and no data are at hand. Pass it.")
    ids = top.train_ids.tolist()
    found = opinions_on(answer, "train", ids)
    bases = ids if top.base_ids is None else top.base_ids.tolist()
    items = [
        plotting.Item(
            str(i) if i == base else f"{i} (base {base})",
            score,
            train[i],
            *((found[i].prediction, found[i].probability) if i in found else ()),
        )
        for i, base, score in zip(ids, bases, top.scores.tolist(), strict=True)
    ]
    text = f"{answer.method}: the {counted(len(items), 'training example')} of highest {title}"
    return plotting.examples(items, title=text, drawing=drawing.suited_to(train))


def _shown(answer: Answer, side: str, data: Any) -> Any:
    """The data of a side, or what the album keeps of it; None without either."""
    return answer.album.looks(side) if data is None and answer.album is not None else data


def opinions_on(answer: Answer, side: str, ids: Sequence[int]) -> Mapping[int, Opinion]:
    """What the model thinks of examples, by id: the model's own word, or else what the album has kept of it."""
    if answer.opinions is not None and (found := answer.opinions(side, ids)):
        return found
    return {} if answer.album is None else answer.album.opinions(side, ids)


def _items_of(
    answer: Answer, ranking: Ranking, ids: Sequence[int], queries: Any, predictions: Any
) -> list[plotting.Item]:
    """Queries to draw, with predictions that are given or those of the model."""
    places(ranking.query_ids, torch.tensor(ids), "query")
    found, items = opinions_on(answer, "queries", ids), []
    for i in ids:
        thinks = found.get(i, Opinion(None))
        told = thinks.prediction, thinks.probability
        if predictions is not None:
            told = predictions[i], None
        items.append(
            plotting.Item(ranking.query_name(i), None, None if queries is None else queries[i], *told, thinks.loss)
        )
    return items


def _is_number(item: plotting.Item) -> bool:
    """Whether the prediction is a number, not a class."""
    predicted = plain(item.prediction)
    return isinstance(predicted, float) and item.probability is None and not predicted.is_integer()


def _case(ranking: Ranking, query: int, item: plotting.Item, k: int, train: Any) -> plotting.Case:
    row = int(places(ranking.query_ids, torch.tensor([query]), "query"))
    ((_, *sides),) = ranking.sides(k, slice(row, row + 1))
    shown = [
        [plotting.Item(ranking.train_name(i), score, None if train is None else train[i]) for i, score in side]
        for side in sides
    ]
    return plotting.Case(item, *shown)


def _classes(name: str, data: Any, ids: Tensor) -> tuple[list[Any], Tensor]:
    """The distinct classes, ascending, and for each id the index of its class.

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
        found = [label_of(data[i]) for i in ids.tolist()]
    missing = [i for i, label in zip(ids.tolist(), found, strict=True) if label is None]
    if missing:
        raise ValueError(
            f"Expected every example of `{name}` to have a class, got none for {missing[:5]!r}. Pass the classes as a "
            "tensor of integers instead of the Dataset."
        )
    if numbers := [label for label in found if isinstance(label, float) and not label.is_integer()]:
        raise ValueError(
            f"Expected `{name}` to have classes, got numbers such as {numbers[0]:.4g}, of which each would be a class. "
            "Pass the number of a group for each as a tensor of integers, such as `targets.bucketize(edges)`."
        )
    classes = sorted(set(found), key=lambda label: (isinstance(label, str), label))
    place = {label: at for at, label in enumerate(classes)}
    return classes, torch.tensor([place[label] for label in found])
