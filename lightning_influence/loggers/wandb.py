"""Weights & Biases: `Table`, `Histogram`, `Image`, all in one row of the run's history."""

import html
from typing import Any

import numpy as np

from lightning_influence.loggers.results import TrackerResults
from lightning_influence.loggers.scalars import write_scalars


def write(logger: Any, results: TrackerResults) -> None:
    """Write the results. Names end with their kind, since a run has one namespace for all kinds."""
    import wandb

    media: dict[str, Any] = {}
    for what, (columns, rows) in results.tables.items():
        # W&B checks every cell, which takes three times as long where one may be missing.
        gaps = any(value is None for row in rows for value in row)
        media[f"{what}_table"] = wandb.Table(columns=list(columns), data=[list(row) for row in rows], optional=gaps)
    for what, bins in results.histograms.items():
        pair = np.array(bins.counts), np.array(bins.edges)
        media[f"{what}_histogram"] = wandb.Histogram(np_histogram=pair)
    for what, figure in results.figures.items():
        media[f"{what}_figure"] = wandb.Image(figure)
    for what, text in results.texts.items():
        media[what] = wandb.Html(f"<pre>{html.escape(text)}</pre>", data_is_not_path=True)
    write_scalars(logger, results, media)
