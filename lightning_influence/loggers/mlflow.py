"""MLflow: metrics, and tables and figures as artifacts of the run."""

import contextlib
from typing import Any

from lightning_influence.loggers.results import TrackerResults
from lightning_influence.loggers.scalars import write_scalars
from lightning_influence.loggers.summary import Table


def write(logger: Any, results: TrackerResults) -> None:
    """Write metrics, then files into the artifact folder `influence/<name>`; a later call replaces them."""
    write_scalars(logger, results)
    client, run = logger.experiment, logger.run_id
    existing = {file.path for file in client.list_artifacts(run, results.file_head)}
    tables = dict(results.tables) | {f"{what}_histogram": bins.table() for what, bins in results.histograms.items()}
    for what, table in tables.items():
        path = f"{results.file_head}/{what}.json"
        _put_table(client, run, path, table, is_new=path not in existing)
    for what, figure in results.figures.items():
        client.log_figure(run, figure, f"{results.file_head}/{what}.png")
    for what, text in results.texts.items():
        client.log_text(run, text, f"{results.file_head}/{what}.txt")


def _put_table(client: Any, run: str, path: str, table: Table, is_new: bool) -> None:
    columns, rows = table
    if is_new:  # `log_table` appends to an existing table, so a second try would duplicate the rows
        with contextlib.suppress(ImportError):  # needs pandas; without it MLflow does not list the file as a table
            client.log_table(run, {c: [row[i] for row in rows] for i, c in enumerate(columns)}, path)
            return
    client.log_dict(run, {"columns": list(columns), "data": [list(row) for row in rows]}, path)
