"""Numbers for a logger of any kind: all that Lightning's `Logger` guarantees to accept."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning_influence.loggers.results import TrackerResults

_log = logging.getLogger("lightning_influence.loggers")


def write_scalars(logger: Any, results: TrackerResults, more: Mapping[str, Any] | None = None) -> None:
    """Write the numbers, and `more` that the logger's `log_metrics` accepts."""
    separator = getattr(logger, "group_separator", "/")
    prefix = separator.join(["influence", results.name, ""])
    found = {prefix + key: value for key, value in {**results.scalars, **(more or {})}.items()}
    if found:
        logger.log_metrics(found, step=results.step)


def write(logger: Any, results: TrackerResults) -> None:
    """Write the numbers, and log that the logger cannot show the rest."""
    write_scalars(logger, results)
    if results.tables or results.figures or results.histograms:
        _log.warning("`%s` supports only the scalars of the influence of %r.", type(logger).__name__, results.name)
    logger.save()
