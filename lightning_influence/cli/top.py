"""Print the strongest proponents and opponents of a query, or the highest self-influence."""

import argparse
from pathlib import Path

import torch

from lightning_influence import SelfScores, TopK
from lightning_influence.cli.reading import below, existing, load
from lightning_influence.scores.id_checks import places
from lightning_influence.scores.words import unit


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("scores", type=Path, help="a file of scores, such as influence/run-0/scores/TracInCP.arrow")
    parser.add_argument("--query", type=int, metavar="ID", help="id of the query (default: the first one)")
    parser.add_argument("-k", type=int, default=5, metavar="K", help="how many proponents and opponents (default: 5)")


def run(options: argparse.Namespace) -> int:
    """Print the ranking."""
    scores = load(below(existing(options.scores)))
    if isinstance(scores, SelfScores):
        if options.query is not None:
            raise ValueError(
                f"Expected scores of queries with `--query {options.query}`, got self-influence, which has none. "
                "Leave `--query` out, or name the file without `.self`."
            )
        print(f"{scores.method}: highest {scores.contents}, {unit(scores.units)}")
        print(scores.top(min(options.k, len(scores)) if options.k > 0 else options.k))
        return 0
    query = int(scores.query_ids[0]) if options.query is None else options.query
    row = int(places(scores.query_ids, torch.tensor([query]), "--query"))
    # Of this query only: a matrix on disk may be larger than memory.
    ((_, *sides),) = scores._ranking.sides(options.k, slice(row, row + 1))
    print(f"{scores.method}: influence on query {query}, {unit(scores.units)}")
    for title, side in zip(("proponents", "opponents"), sides, strict=True):
        print(f"\n{title}")
        ids, values = zip(*side, strict=True) if side else ((), ())
        found = TopK(torch.tensor(values, dtype=torch.float64), torch.tensor(ids, dtype=torch.int64))
        print(found.about(None, scores.train_ids, scores.base_ids().train_ids) if side else "  none")
    return 0
