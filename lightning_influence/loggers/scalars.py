"""Numbers into a logger of any kind: all that Lightning's `Logger` promises to take."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning_influence.loggers.pages import Pages

_log = logging.getLogger("lightning_influence.loggers")


def write_scalars(logger: Any, pages: Pages, more: Mapping[str, Any] | None = None) -> None:
    """Write the numbers, and what else the logger's `log_metrics` takes."""
    between = getattr(logger, "group_separator", "/")
    prefix = between.join(["influence", pages.name, ""])
    found = {prefix + key: value for key, value in {**pages.scalars, **(more or {})}.items()}
    if found:
        logger.log_metrics(found, step=pages.step)


def write(logger: Any, pages: Pages) -> None:
    """Write the numbers, and say that the rest has no place here."""
    write_scalars(logger, pages)
    if pages.tables or pages.figures or pages.histograms:
        _log.warning("`%s` got the scalars of the influence of %r only.", type(logger).__name__, pages.name)
    logger.save()
