"""Weights & Biases: `Table`, `Histogram`, `Image`, all in one row of the run's history."""

import html
from typing import Any

import numpy as np

from lightning_influence.loggers.pages import Pages
from lightning_influence.loggers.scalars import write_scalars


def write(logger: Any, pages: Pages) -> None:
    """Write all of it; the kind stands in the name, since a run has one namespace for all."""
    import wandb

    media: dict[str, Any] = {}
    for what, (columns, rows) in pages.tables.items():
        # W&B looks at every cell: where one may be missing, that takes three times as long.
        gaps = any(value is None for row in rows for value in row)
        media[f"{what}_table"] = wandb.Table(columns=list(columns), data=[list(row) for row in rows], optional=gaps)
    for what, bins in pages.histograms.items():
        pair = np.array(bins.counts), np.array(bins.edges)
        media[f"{what}_histogram"] = wandb.Histogram(np_histogram=pair)
    for what, figure in pages.figures.items():
        media[f"{what}_figure"] = wandb.Image(figure)
    for what, text in pages.texts.items():
        media[what] = wandb.Html(f"<pre>{html.escape(text)}</pre>", data_is_not_path=True)
    write_scalars(logger, pages, media)
