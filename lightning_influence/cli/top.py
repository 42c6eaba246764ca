"""Print the strongest proponents and opponents of a query, or the highest self-influence."""

import argparse
from pathlib import Path

import torch

from lightning_influence import SelfScores, TopK
from lightning_influence.cli.reading import existing, load
from lightning_influence.cli.text import table
from lightning_influence.scores.base import places


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("scores", type=Path, help="a file of scores, such as influence/run-0/scores/TracInCP.arrow")
    parser.add_argument("--query", type=int, metavar="ID", help="id of the query (default: the first one)")
    parser.add_argument("-k", type=int, default=5, metavar="K", help="how many proponents and opponents (default: 5)")


def run(options: argparse.Namespace) -> int:
    """Print the ranking."""
    scores = load(existing(options.scores))
    if isinstance(scores, SelfScores):
        if options.query is not None:
            raise ValueError(
                f"Expected scores of queries with `--query {options.query}`, got self-influence, which has none. "
                "Leave `--query` out, or name the file without `.self`."
            )
        ranked = scores.to_arrow(min(options.k, len(scores)) if options.k > 0 else options.k)
        print(f"{scores.method}: highest self-influence of {len(scores):,} training examples ({scores.units})")
        print(table(ranked.column_names, [list(row.values()) for row in ranked.to_pylist()]))
        return 0
    query = int(scores.query_ids[0]) if options.query is None else options.query
    row = int(places(scores.query_ids, torch.tensor([query]), "--query"))
    base = scores.base_ids().train_ids
    # Only this query's row is read: a matrix on disk may be larger than memory.
    ends = [scores._strongest(options.k, largest, slice(row, row + 1)) for largest in (True, False)]
    print(f"{scores.method}: influence on query {query} ({scores.units})")
    for title, sign, end in (("proponents", 1, ends[0]), ("opponents", -1, ends[1])):
        print(f"\n{title}")
        kept = _of_sign(end, sign)
        at = torch.searchsorted(scores.train_ids, kept.train_ids)
        names, columns = ["train_id", "score"], [kept.train_ids.tolist(), kept.scores.tolist()]
        if not torch.equal(base, scores.train_ids):
            names, columns = ["train_id", "train_base_id", "score"], [columns[0], base[at].tolist(), columns[1]]
        print(table(names, list(zip(*columns, strict=True))) if len(columns[0]) else "  none")
    return 0


def _of_sign(end: TopK, sign: int) -> TopK:
    """The scores of the given sign: a positive score is no opponent, however low it ranks."""
    right = end.scores[0] * sign > 0
    return TopK(end.scores[0][right], end.train_ids[0][right])
