"""Print the strongest proponents and opponents of a query, or the highest self-influence."""

import argparse
from pathlib import Path

import torch

from lightning_influence import SelfScores
from lightning_influence.cli.reading import existing, load
from lightning_influence.cli.text import table
from lightning_influence.scores.id_checks import places


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
    # Of this query only: a matrix on disk may be larger than memory.
    ((_, *sides),) = scores._ranking.sides(options.k, slice(row, row + 1))
    print(f"{scores.method}: influence on query {query} ({scores.units})")
    for title, side in zip(("proponents", "opponents"), sides, strict=True):
        print(f"\n{title}")
        names, rows = ["train_id", "score"], [list(pair) for pair in side]
        if not torch.equal(base, scores.train_ids):
            at = places(scores.train_ids, torch.tensor([train_id for train_id, _ in side], dtype=torch.int64), "ids")
            names = ["train_id", "train_base_id", "score"]
            rows = [[i, other, score] for (i, score), other in zip(side, base[at].tolist(), strict=True)]
        print(table(names, rows) if rows else "  none")
    return 0
