"""Write one HTML page to review suspicious training examples and explanations."""

import argparse
from pathlib import Path

import torch

from lightning_influence import Scores, SelfScores
from lightning_influence.cli.reading import below, existing, finished_files, load


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("scores", type=Path, help="a file of scores, or a folder of them or of runs")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("influence.html"), help="the page (default: influence.html)"
    )


def run(options: argparse.Namespace) -> int:
    """Write the page, sorted by the list of suspect labels beside the scores, or else by their self-influence."""
    path, others = _chosen(below(existing(options.scores)))
    scores = load(path)
    if isinstance(scores, SelfScores):
        scores.report(options.output)
    else:
        beside = (path.with_name("labels.self.arrow"), path.with_suffix(".self.arrow"))
        found = [SelfScores.load(file) for file in beside if file.is_file()]
        scores.report(options.output, self_scores=next((one for one in found if _same(one, scores)), None))
    if scores.album is None:
        call = f"{type(scores).__name__}.load({str(path)!r}).report({str(options.output)!r}, train=dataset"
        call += "" if isinstance(scores, SelfScores) else ", queries=queries"
        print(
            "Examples are shown by their ids alone: the file has none. `Influence(album=True)` keeps some with the "
            f"scores of the next fit; for these, where the data are, in Python: `{call})`."
        )
    print(options.output)
    if others:
        print(f"It shows {path}. There are also:" + "".join(f"\n  {file}" for file in others))
    return 0


def _chosen(path: Path) -> tuple[Path, list[Path]]:
    """The file of scores to show, for a folder the newest of the newest run with queries, and others of that kind."""
    if not path.is_dir():
        return path, []
    found = finished_files(path)
    # Self-influence and losses are columns of a page with queries.
    found = [file for file in found if not file.stem.endswith(".self")] or found
    found.sort(key=lambda file: file.stat().st_mtime_ns)
    return (found[-1], found[:-1]) if found else (path, [])


def _same(itself: SelfScores, scores: Scores) -> bool:
    return torch.equal(itself.train_ids, scores.train_ids)
