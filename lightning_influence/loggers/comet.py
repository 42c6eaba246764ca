"""Comet: metrics, tables as assets, histograms and figures, by the experiment's own calls."""

from typing import Any

from lightning_influence.loggers.pages import Pages
from lightning_influence.loggers.scalars import write_scalars


def write(logger: Any, pages: Pages) -> None:
    """Write all of it."""
    from comet_ml.data_structure import Histogram

    write_scalars(logger, pages)
    experiment, step = logger.experiment, pages.step or 0  # Comet wants a step for a histogram
    for what, (columns, rows) in pages.tables.items():
        experiment.log_table(f"{pages.file_head}/{what}.csv", [list(row) for row in rows], headers=list(columns))
    for what, bins in pages.histograms.items():
        middles = [(low + high) / 2 for low, high in zip(bins.edges[:-1], bins.edges[1:], strict=True)]
        counted = Histogram()
        counted.add(middles, counts=bins.counts)
        experiment.log_histogram_3d(counted, name=f"{pages.head}/{what}", step=step)
    for what, figure in pages.figures.items():
        experiment.log_figure(f"{pages.head}/{what}", figure, step=step)
    for what, text in pages.texts.items():
        experiment.log_text(text, step=step, metadata={"name": f"{pages.head}/{what}"})
    experiment.flush()
