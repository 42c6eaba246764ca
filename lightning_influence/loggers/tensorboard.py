"""TensorBoard: scalars, histograms, images, and tables as text."""

from typing import Any

from lightning_influence.loggers.pages import Pages
from lightning_influence.loggers.scalars import write_scalars
from lightning_influence.loggers.summary import Table

_ROWS = 200  # a text is rendered as one page


def write(logger: Any, pages: Pages) -> None:
    """Write all of it; the kind stands in the name: TensorBoard shows one kind only of what has one name."""
    write_scalars(logger, pages)
    writer = logger.experiment
    for what, text in pages.texts.items():
        writer.add_text(f"{pages.head}/{what}", text, pages.step)
    for what, table in pages.tables.items():
        writer.add_text(f"{pages.head}/{what}_table", markdown(table), pages.step)
    for what, bins in pages.histograms.items():
        # A bucket ends at its limit and begins at the one before: an empty one in front says where the first begins.
        writer.add_histogram_raw(
            f"{pages.head}/{what}_histogram",
            min=bins.edges[0],
            max=bins.edges[-1],
            num=sum(bins.counts),
            sum=bins.total,
            sum_squares=bins.squares,
            bucket_limits=bins.edges,
            bucket_counts=[0, *bins.counts],
            global_step=pages.step,
        )
    for what, figure in pages.figures.items():
        writer.add_figure(f"{pages.head}/{what}_figure", figure, pages.step, close=False)
    writer.flush()


def markdown(table: Table) -> str:
    """The first rows of a table as Markdown, and how many more there are."""
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows[:_ROWS]]
    text = "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)
    left = len(rows) - _ROWS
    return text if left <= 0 else f"{text}\n\n{left:,} more rows: `scores.to_arrow(k)` has them all."


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", r"\|").replace("\n", " ")
