"""Lightning's CSV logger: tables and pictures as files beside `metrics.csv`."""

from typing import Any

from lightning_influence.loggers.pages import Pages, as_csv, as_png, file_name
from lightning_influence.loggers.scalars import write_scalars


def write(logger: Any, pages: Pages) -> None:
    """Write one CSV file a table or histogram, one PNG file a figure."""
    # First: a writer that is only made now clears a folder that holds files.
    write_scalars(logger, pages)
    logger.save()
    head = f"{logger.log_dir}/influence_{file_name(pages.name)}_"
    for what, table in pages.tables.items():
        _write(f"{head}{what}.csv", as_csv(table).encode())
    for what, bins in pages.histograms.items():
        _write(f"{head}{what}_histogram.csv", as_csv(bins.table()).encode())
    for what, figure in pages.figures.items():
        _write(f"{head}{what}.png", as_png(figure))
    for what, text in pages.texts.items():
        _write(f"{head}{what}.txt", text.encode())


def _write(path: str, content: bytes) -> None:
    # Loggers write where fsspec reaches, not only on this disk. It comes with Lightning, hence with any logger.
    import fsspec

    with fsspec.open(path, "wb") as file:
        file.write(content)
