"""Comet: metrics, tables as assets, histograms and figures, through the API of the experiment."""

from typing import Any

from lightning_influence.loggers.results import TrackerResults
from lightning_influence.loggers.scalars import write_scalars


def write(logger: Any, results: TrackerResults) -> None:
    """Write the results."""
    from comet_ml.data_structure import Histogram

    write_scalars(logger, results)
    experiment, step = logger.experiment, results.step or 0  # Comet requires a step for a histogram
    for what, (columns, rows) in results.tables.items():
        experiment.log_table(f"{results.file_head}/{what}.csv", [list(row) for row in rows], headers=list(columns))
    for what, bins in results.histograms.items():
        middles = [(low + high) / 2 for low, high in zip(bins.edges[:-1], bins.edges[1:], strict=True)]
        counted = Histogram()
        counted.add(middles, counts=bins.counts)
        experiment.log_histogram_3d(counted, name=f"{results.head}/{what}", step=step)
    for what, figure in results.figures.items():
        experiment.log_figure(f"{results.head}/{what}", figure, step=step)
    for what, text in results.texts.items():
        experiment.log_text(text, step=step, metadata={"name": f"{results.head}/{what}"})
    experiment.flush()
