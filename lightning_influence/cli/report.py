"""Write one HTML page to review suspicious training examples and explanations."""

import argparse
from pathlib import Path

from lightning_influence import SelfScores
from lightning_influence.cli.reading import existing, load


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("scores", type=Path, help="a file of scores, such as influence/run-0/scores/TracInCP.arrow")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("influence.html"), help="the page (default: influence.html)"
    )


def run(options: argparse.Namespace) -> int:
    """Write the page, sorted by self-influence where its file is beside that of the scores."""
    path: Path = existing(options.scores)
    scores = load(path)
    beside = path.with_suffix(".self.arrow")
    if isinstance(scores, SelfScores):
        scores.report(options.output)
    else:
        scores.report(options.output, self_scores=SelfScores.load(beside) if beside.is_file() else None)
    print(options.output)
    return 0
