"""MLflow: metrics, and tables and figures as artifacts of the run."""

import contextlib
from typing import Any

from lightning_influence.loggers.pages import Pages
from lightning_influence.loggers.scalars import write_scalars
from lightning_influence.loggers.summary import Table


def write(logger: Any, pages: Pages) -> None:
    """Write metrics, then files into the artifact folder `influence/<name>`; a later call replaces them."""
    write_scalars(logger, pages)
    client, run = logger.experiment, logger.run_id
    there = {file.path for file in client.list_artifacts(run, pages.file_head)}
    tables = dict(pages.tables) | {f"{what}_histogram": bins.table() for what, bins in pages.histograms.items()}
    for what, table in tables.items():
        path = f"{pages.file_head}/{what}.json"
        _put_table(client, run, path, table, is_new=path not in there)
    for what, figure in pages.figures.items():
        client.log_figure(run, figure, f"{pages.file_head}/{what}.png")
    for what, text in pages.texts.items():
        client.log_text(run, text, f"{pages.file_head}/{what}.txt")


def _put_table(client: Any, run: str, path: str, table: Table, is_new: bool) -> None:
    columns, rows = table
    if is_new:  # into a table that is there `log_table` appends, and a second try would double it
        with contextlib.suppress(ImportError):  # it wants pandas; without, the same file is no *table* to MLflow's page
            client.log_table(run, {c: [row[i] for row in rows] for i, c in enumerate(columns)}, path)
            return
    client.log_dict(run, {"columns": list(columns), "data": [list(row) for row in rows]}, path)
