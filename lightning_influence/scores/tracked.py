"""What trackers get of scores beside the numbers: which examples they are, and the query that tells most."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_influence import loggers as trackers
from lightning_influence.files import arrow
from lightning_influence.loggers import TrackerResults
from lightning_influence.loggers.summary import Table
from lightning_influence.report import Showing
from lightning_influence.scores.base import Answer
from lightning_influence.scores.data import given_or_at_hand
from lightning_influence.scores.figures import opinions_on
from lightning_influence.scores.ranking import Ranking
from lightning_influence.scores.ranking import side as side_of
from lightning_influence.scores.tables import long_table
from lightning_influence.wording import counted

_TRAIN, _QUERIES = 200, 100  # examples that are described, in the order of the rows
_ASKED = 2000  # queries that the model predicts to choose one
_TEXT = 80  # characters of a text
_COLUMNS = {
    "class": "class",
    "prediction": "predicted",
    "probability": "probability",
    "loss": "loss",
    "example": "example",
}


def results(
    answer: Answer, ranking: Ranking, k: int, plot: Callable[..., tuple[Any, Any]], drawing: Mapping[str, Any]
) -> TrackerResults:
    """What trackers get of a score matrix: scalars, a histogram, a table of k of each end, and a figure.

    Args:
        answer: The scores.
        ranking: The same.
        k: Proponents and opponents per query.
        plot: Draws a query.
        drawing: Arguments of `plot`.
    """
    scalars, histograms = trackers.of_scores(ranking.strongest(1, True).scores[:, 0], ranking.matrix_if_kept)
    table = arrow.as_rows(long_table(ranking, k).read_all(), side=lambda row: side_of(row["score"]))
    told = {"scores": described(answer, table, drawing)}
    drawn = trackers.drawn(explanation=lambda: explanation(answer, ranking.query_ids.tolist(), plot, drawing))
    return TrackerResults(answer.method, None, scalars, told, drawn, histograms, {"about": repr(answer)})


def described(answer: Answer, table: Table, drawing: Mapping[str, Any]) -> Table:
    """The table with the class, the prediction, the loss and a line of text of the first examples in it.

    Args:
        answer: Has the data at hand, or `drawing` has them.
        table: With columns `query_id` and `train_id`, or the latter alone.
        drawing: Arguments of `plot`.
    """
    names, rows = [*table[0]], [[*row] for row in table[1]]
    train, queries = given_or_at_hand(answer, drawing.get("train"), drawing.get("queries"))
    options = {name: drawing[name] for name in ("render", "labels", "columns", "normalization") if name in drawing}
    showing = answer.viewed(Showing(**options, opinions=answer.opinions)).suited_to(train, queries)
    for side, dataset, most in (("query", queries, _QUERIES), ("train", train, _TRAIN)):
        if dataset is None or f"{side}_id" not in names:
            continue
        place = names.index(f"{side}_id")
        ids = list(dict.fromkeys(row[place] for row in rows))[:most]
        try:
            found: dict[int, dict[str, Any]] = {i: showing.words(dataset[i], _TEXT) for i in ids}
        except Exception:  # what the data raise is no reason to lose the table; the figure's warning tells of it
            continue
        showing.judged("train" if side == "train" else "queries", found)
        numbers = any("prediction" in w for w in found.values()) and not any("probability" in w for w in found.values())
        for key, word in _COLUMNS.items():
            if any(key in words for words in found.values()):
                names.append(f"{side}_{'target' if key == 'class' and numbers else word}")
                for row in rows:
                    row.append(found.get(row[place], {}).get(key))
    return names, rows


def telling_query(answer: Answer, query_ids: Sequence[int]) -> tuple[int | None, str]:
    """A wrongly predicted query of highest loss, or that of highest loss, and why it was chosen."""
    ids = list(query_ids[:_ASKED])
    known = {i: opinion for i, opinion in opinions_on(answer, "queries", ids).items() if opinion.loss is not None}
    if not known:
        return None, ""
    chosen = max(known, key=lambda i: (known[i].right is False, known[i].loss))
    wrong = sum(opinion.right is False for opinion in known.values())
    asked, loss = counted(len(known), "query"), f"{known[chosen].loss:.3g}"
    why = f"the highest loss of {asked}: {loss}"
    if wrong:
        why = f"the highest loss ({loss}) of {wrong:,} wrongly predicted among {asked}"
    return chosen, f"Query {chosen} has {why}."


def explanation(
    answer: Answer, query_ids: Sequence[int], plot: Callable[..., tuple[Any, Any]], drawing: Mapping[str, Any]
) -> Any:
    """The figure of a query; of the most telling one where none is named, and then with a line that says why."""
    if drawing.get("query") is not None:
        return plot(**drawing)[0]
    query, why = telling_query(answer, query_ids)
    figure = plot(**{**drawing, "query": query})[0]
    if why:
        figure.supxlabel(why, fontsize=8)
    return figure
