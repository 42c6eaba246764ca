"""Scalars, tables, histograms and figures into whatever loggers a Trainer has: a file for each tracker, one table.

The table holds the proponents and opponents of each query, or the training examples of highest self-influence;
TensorBoard shows its first 200 rows, Weights & Biases, MLflow, Comet and CSV all of it. 1,000 queries × 50,000 training
examples with ``top_k=20``, all 40 rows each, take 1.0 s to 3.4 s and at most 41 MB of memory (two CPU cores;
``tests/benchmarks/trackers.py``).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_influence.loggers import comet, csv_files, mlflow, scalars, tensorboard, wandb
from lightning_influence.loggers.pages import Pages
from lightning_influence.loggers.summary import Histogram, Table, of_scores, of_self_influence

__all__ = [
    "WRITERS",
    "Histogram",
    "Pages",
    "Table",
    "drawn",
    "listening",
    "log_influence",
    "of_scores",
    "of_self_influence",
]

_log = logging.getLogger(__name__)

WRITERS: dict[str, Callable[[Any, Pages], None]] = {
    "TensorBoardLogger": tensorboard.write,
    "CSVLogger": csv_files.write,
    "WandbLogger": wandb.write,
    "MLFlowLogger": mlflow.write,
    "CometLogger": comet.write,
}
"""Who writes into a logger, by the name of its class or of a class that it derives from."""


def log_influence(loggers: Any, pages: Pages) -> None:
    """Write one method's results into every logger, each as far as it can show them.

    A logger that fails is warned about by name; the others still get theirs. Off rank zero, without loggers and under
    `fast_dev_run` nothing happens.

    Args:
        loggers: `trainer.loggers`, or one logger of either Lightning package.
        pages: The results.
    """
    for logger in listening(loggers):
        try:
            _writer(logger)(logger, pages)
        except Exception as error:  # whatever a tracker may raise (network, quota, disk) is not worth the scores
            warnings.warn(
                f"`{type(logger).__name__}` did not take the influence of {pages.name!r} "
                f"({type(error).__name__}: {error}). The scores and the other loggers are not affected; "
                "call `scores.log(logger)` to try again.",
                stacklevel=2,
            )


def listening(loggers: Any) -> list[Any]:
    """The loggers that keep what they are given; none off rank zero."""
    # Lightning sets the rank when it is imported; without it there is one process.
    if getattr(rank_zero_only, "rank", 0) != 0 or loggers is None:
        return []
    every = list(loggers) if isinstance(loggers, Iterable) and "Logger" not in _names(loggers) else [loggers]
    return [logger for logger in every if logger and "DummyLogger" not in _names(logger)]


def drawn(**draw: Callable[[], Any]) -> Mapping[str, Any]:
    """What each `draw` draws, by name, without what cannot be drawn: a picture is not worth the scores.

    Without matplotlib that is a note; any other failure (an example that cannot be drawn) is a warning.
    """
    figures = {}
    for what, make in draw.items():
        try:
            figures[what] = make()
        except ImportError as error:
            _log.warning("No figure was logged: %s", error)
        except Exception as error:
            warnings.warn(
                f"No figure was logged ({type(error).__name__}: {error}). Pass `render=` to draw your examples.",
                stacklevel=3,
            )
    return figures


def _names(logger: Any) -> list[str]:
    # By name, since `pytorch_lightning` and `lightning.pytorch` have classes of their own, and trackers are optional.
    return [parent.__name__ for parent in type(logger).__mro__]


def _writer(logger: Any) -> Callable[[Any, Pages], None]:
    return next((WRITERS[name] for name in _names(logger) if name in WRITERS), scalars.write)
