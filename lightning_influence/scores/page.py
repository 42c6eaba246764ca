"""Scores in a browser: the page to review, the album of examples that a file keeps, and the view in a notebook."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence import report
from lightning_influence.hints import meant
from lightning_influence.report import Album, Showing
from lightning_influence.scores.base import Answer, facts
from lightning_influence.scores.data import Data, given_or_at_hand
from lightning_influence.scores.ranking import Ranking, row_blocks
from lightning_influence.wording import counted

Orders: TypeAlias = tuple[Iterable[int], Iterable[int]]
"""Ids of training examples and of queries, the most important first."""

_TOTAL = "Above 0, training on the example made the queries better in all, below 0 worse."
_SHARES = (
    "Scores without a unit cannot be added up: this is the mean of their shares of each query's strongest score, from "
    "-1 to 1."
)
_FEWER = "For each query, the {} and as many opponents are on this page, which would be too large otherwise."
_EXPLAINING = 400_000  # scores of single queries on a page, about 6 MB
_KEPT = ("train", "queries", "render", "labels", "predictions", "columns", "normalization", "megabytes", "k")
_FIRST = 2000  # training examples that go into an album before those that explain queries


def page_of(answer: Answer, ranking: Ranking, k: int, own: Mapping[str, Any], album: Album) -> report.Page:
    """The page of a score matrix, whose training examples are sorted by their `own` scores, by title, if any."""
    shares = answer.units == "arbitrary"
    kept = "" if ranking.top is None else " of the scores kept"
    title = f"Influence on all queries ({'mean share' if shares else 'sum'}{kept})"
    train = counted(len(ranking.train_ids), "training example")
    few = max(1, min(k, _EXPLAINING // (2 * len(ranking.query_ids))))
    return report.Page(
        title=f"{answer.method}: {counted(len(ranking.query_ids), 'query')}, {train}",
        facts=[*facts(answer), *([_FEWER.format(counted(few, "strongest proponent"))] if few < k else [])],
        units=answer.units,
        train_ids=ranking.train_ids,
        train_base=ranking.train_base,
        columns={name: one.values for name, one in own.items()} | {title: _total(ranking, answer.units)},
        meanings={name: one.meaning for name, one in own.items()} | {title: _SHARES if shares else _TOTAL},
        query_ids=ranking.query_ids,
        query_base=ranking.query_base,
        pairs=_pairs(ranking, few),
        album=album,
    )


def own_of(answer: Answer, own: Any) -> dict[str, Any]:
    """The `SelfScores` by the title of their column; empty without any.

    Raises:
        TypeError: They are something else, such as a name.
        ValueError: They are of other training examples than the scores.
    """
    if own is not None and not hasattr(own, "train_ids"):
        raise TypeError(
            f"Expected `self_scores` to be `SelfScores`, got {own!r}. Pass `influence.self_scores[...]` or "
            "`attributor.losses(checkpoints='all')`."
        )
    if own is not None and not torch.equal(own.train_ids, answer.train_ids):
        raise ValueError(
            f"Expected `self_scores` of the same {answer.train_ids.numel()} training examples, got "
            f"{own.train_ids.numel()} others. Compute both from one attributor."
        )
    return {} if own is None else {own.title.capitalize(): own}


def snippet(paragraph: str, ranking: Ranking, album: Album | None) -> str:
    """Some queries with their strongest proponents and opponents, for a notebook: the most telling ones of an album."""
    album, ids = album or Album(), ranking.query_ids.tolist()
    told = album.opinions("queries", ids)
    telling = sorted(told, key=lambda i: (told[i].right is not False, -(told[i].loss or 0.0)))
    rows, known = [], known_of(album.queries)
    for i in (telling + [i for i in ids if i not in told])[:5] if telling else ids[:5]:
        row = ids.index(i)
        ((query, *sides),) = ranking.sides(min(3, ranking.depth), slice(row, row + 1))
        # An id, its class and its score stay on one line.
        cells = [
            ", ".join(
                " ".join([ranking.train_name(i), album.train.get(i, {}).get("class", ""), f"({score:+.3g})"])
                .replace("  ", " ")
                .replace(" ", "\u00a0")
                for i, score in side
            )
            for side in sides
        ]
        look = album.queries.get(query, {})
        rows.append([ranking.query_name(query), *(look.get(key, "") for key in known.values()), *cells])
    columns = ["query", *known, "strongest proponents", "strongest opponents"]
    return report.snippet(paragraph, columns, rows)


def known_of(looks: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Which of class and prediction an album has of examples: the key in it, by the title of a column."""
    titles = {"class": "class", "predicted": "prediction"}
    return {title: key for title, key in titles.items() if any(key in look for look in looks.values())}


def album_of(answer: Answer, orders: Orders, data: Data, how: Showing, megabytes: float) -> Album:
    """The album that the scores already have, or a new one where other data, or another view of them, is given."""
    another = any(one is not None for one in (how.render, how.labels, how.columns, how.normalization, how.predictions))
    here = any(one is not None for one in answer.at_hand)
    if answer.album is not None and all(one is None for one in data) and not (another and here):
        return replace(answer.album, kept=True)
    how = answer.viewed(replace(how, opinions=answer.opinions))
    return report.collect(*given_or_at_hand(answer, *data), *orders, how, megabytes)


def album_to_keep(answer: Answer, orders: Orders, shown: Mapping[str, Any]) -> Album:
    """Collect the album for a file, by the keyword arguments of `save`.

    Raises:
        TypeError: Another argument.
        ValueError: There are no data to show.
    """
    for name in shown.keys() - _KEPT:
        raise TypeError(f"Expected an argument of `{type(answer).__name__}.save`, got `{name}`. {meant(name, _KEPT)}")
    how = {name: value for name, value in shown.items() if name != "k"}
    data = given_or_at_hand(answer, how.pop("train", None), how.pop("queries", None))
    if all(one is None for one in data):
        raise ValueError(
            f"Expected data to show with `{'`, `'.join(shown)}`, got none: they are available only in the "
            "process that computed the scores. Pass `train=` and `queries=` too."
        )
    megabytes = how.pop("megabytes", 15.0)
    return report.collect(*data, *orders, answer.viewed(Showing(**how, opinions=answer.opinions)), megabytes)


def train_order(ranking: Ranking, units: str, k: int, self_influence: Tensor | None = None) -> Iterator[int]:
    """Training ids by importance: suspicious ones, then the k strongest of each query by rank; may repeat."""
    suspicion = -_total(ranking, units).nan_to_num(0.0) if self_influence is None else self_influence
    suspicious = ranking.train_ids[suspicion.argsort(descending=True, stable=True)].tolist()
    ends = [ranking.strongest(k, largest).train_ids for largest in (True, False)]
    explaining = torch.stack(ends).permute(2, 1, 0).flatten().tolist()
    yield from (*suspicious[:_FIRST], *explaining, *suspicious[_FIRST:])


def _total(ranking: Ranking, units: str) -> Tensor:
    """[train] over all queries and the scores that were kept: sums, or the mean of shares where scores have no unit."""
    total = torch.zeros(ranking.train_ids.numel(), dtype=torch.float64)
    shares = units == "arbitrary"
    if ranking.values is not None:
        for block in row_blocks(ranking.matrix, total.numel()):
            total += _comparable(block, shares).sum(dim=0)
    else:
        places, scores = _pairs(ranking, ranking.depth)
        kept = places >= 0
        total.index_add_(0, places[kept], _comparable(scores, shares)[kept])
    return total / len(ranking.query_ids) if shares else total


def _comparable(scores: Tensor, shares: bool) -> Tensor:
    """[query, *] float64 with 0 for NaN; as shares of the strongest of each query."""
    found = scores.double()
    found = found.masked_fill(found.isnan(), 0.0)
    return found / found.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) if shares else found


def _pairs(ranking: Ranking, k: int) -> tuple[Tensor, Tensor]:
    """[query, 2 k] positions in `train_ids` and scores of proponents and opponents; -1 where a score is neither."""
    best, worst = (ranking.strongest(k, largest) for largest in (True, False))
    places = torch.searchsorted(ranking.train_ids, torch.cat([best.train_ids, worst.train_ids], dim=1))
    fits = torch.cat([best.scores > 0, worst.scores < 0], dim=1)
    return places.masked_fill(~fits, -1), torch.cat([best.scores, worst.scores], dim=1)
