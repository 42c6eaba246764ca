"""TensorBoard: scalars, histograms, images, and tables as text."""

import html
import re
from typing import Any

from lightning_influence.loggers.results import TrackerResults
from lightning_influence.loggers.scalars import write_scalars
from lightning_influence.loggers.summary import Table

_ROWS = 200  # TensorBoard renders the whole text at once


def write(logger: Any, results: TrackerResults) -> None:
    """Write the results. Names end with their kind, since TensorBoard shows only one kind per name."""
    write_scalars(logger, results)
    writer = logger.experiment
    for what, text in results.texts.items():
        paragraphs = _cell(text.replace("\nNote: ", "\0Note: ")).replace("\0", "\n\n")
        writer.add_text(f"{results.head}/{what}", paragraphs, results.step)
    for what, table in results.tables.items():
        writer.add_text(f"{results.head}/{what}_table", markdown(table), results.step)
    for what, bins in results.histograms.items():
        # A bucket ends at its limit and begins at the previous one. An empty first bucket marks where the data begin.
        writer.add_histogram_raw(
            f"{results.head}/{what}_histogram",
            min=bins.edges[0],
            max=bins.edges[-1],
            num=sum(bins.counts),
            sum=bins.total,
            sum_squares=bins.squares,
            bucket_limits=bins.edges,
            bucket_counts=[0, *bins.counts],
            global_step=results.step,
        )
    for what, figure in results.figures.items():
        writer.add_figure(f"{results.head}/{what}_figure", figure, results.step, close=False)
    writer.flush()


def markdown(table: Table) -> str:
    """The first rows of a table as Markdown, and how many more there are."""
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows[:_ROWS]]
    text = "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)
    more = len(rows) - _ROWS
    return text if more <= 0 else f"{text}\n\n{more:,} more rows: `scores.to_arrow(k)` has them all."


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    # An underline within a word, as in train_id, stands for itself in Markdown.
    return re.sub(r"([\\`*{}\[\]#|~]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(" ".join(text.split()), quote=False))
