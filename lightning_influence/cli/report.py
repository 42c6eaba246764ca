"""Write one HTML page to review suspicious training examples and explanations."""

import argparse
from pathlib import Path

import torch

from lightning_influence import Scores, SelfScores
from lightning_influence.cli.reading import existing, load


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("scores", type=Path, help="a file of scores, such as influence/run-0/scores/TracInCP.arrow")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("influence.html"), help="the page (default: influence.html)"
    )


def run(options: argparse.Namespace) -> int:
    """Write the page, sorted by the list of suspect labels beside the scores, or else by their self-influence."""
    path: Path = existing(options.scores)
    scores = load(path)
    if isinstance(scores, SelfScores):
        scores.report(options.output)
    else:
        beside = (path.with_name("labels.self.arrow"), path.with_suffix(".self.arrow"))
        found = [SelfScores.load(file) for file in beside if file.is_file()]
        scores.report(options.output, self_scores=next((one for one in found if _same(one, scores)), None))
    print(options.output)
    return 0


def _same(itself: SelfScores, scores: Scores) -> bool:
    return torch.equal(itself.train_ids, scores.train_ids)
