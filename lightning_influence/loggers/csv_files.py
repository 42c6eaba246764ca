"""Lightning's CSV logger: tables and pictures as files beside `metrics.csv`."""

from typing import Any

from lightning_influence.loggers.results import TrackerResults, as_csv, as_png, file_name
from lightning_influence.loggers.scalars import write_scalars


def write(logger: Any, results: TrackerResults) -> None:
    """Write one CSV file per table or histogram, one PNG file per figure and one text file per text."""
    # First: the logger's writer may be created here, and it clears a folder that already holds files.
    write_scalars(logger, results)
    logger.save()
    head = f"{logger.log_dir}/influence_{file_name(results.name)}_"
    for what, table in results.tables.items():
        _write(f"{head}{what}.csv", as_csv(table).encode())
    for what, bins in results.histograms.items():
        _write(f"{head}{what}_histogram.csv", as_csv(bins.table()).encode())
    for what, figure in results.figures.items():
        _write(f"{head}{what}.png", as_png(figure))
    for what, text in results.texts.items():
        _write(f"{head}{what}.txt", text.encode())


def _write(path: str, content: bytes) -> None:
    # Loggers write to any file system of fsspec, not only to this disk. Lightning depends on fsspec.
    import fsspec

    with fsspec.open(path, "wb") as file:
        file.write(content)
