"""Scalars, tables, histograms and figures into whatever loggers a Trainer has: a file for each tracker, one table.

The table holds the proponents and opponents of each query, or the training examples of highest self-influence;
TensorBoard shows its first 200 rows, Weights & Biases, MLflow, Comet and CSV all of it. 1,000 queries × 50,000 training
examples with ``top_k=20``, all 40 rows each, take 1.0 s to 3.4 s and at most 41 MB of memory (two CPU cores;
``tests/benchmarks/trackers.py``).
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_influence.loggers import comet, csv_files, mlflow, scalars, tensorboard, wandb
from lightning_influence.loggers.results import TrackerResults
from lightning_influence.loggers.summary import of_scores, of_self_influence

__all__ = ["WRITERS", "TrackerResults", "drawn", "listening", "log_influence", "of_scores", "of_self_influence"]

_log = logging.getLogger(__name__)

WRITERS: dict[str, Callable[[Any, TrackerResults], None]] = {
    "TensorBoardLogger": tensorboard.write,
    "CSVLogger": csv_files.write,
    "WandbLogger": wandb.write,
    "MLFlowLogger": mlflow.write,
    "CometLogger": comet.write,
}
"""The function that writes into a logger, by the name of the logger's class or of one of its bases."""


def log_influence(loggers: Any, results: TrackerResults) -> None:
    """Write one method's results into every logger, as far as the logger supports them.

    If a logger fails, a warning names it, and the other loggers still get the results. Nothing happens on other ranks
    than zero, without loggers, and under `fast_dev_run`.

    Args:
        loggers: `trainer.loggers`, or one logger of either Lightning package.
        results: The results.
    """
    for logger in listening(loggers):
        try:
            _writer(logger)(logger, results)
        except Exception as error:  # a tracker that fails (network, quota, disk) must not cost the scores
            warnings.warn(
                f"`{type(logger).__name__}` failed to log the influence of {results.name!r} "
                f"({type(error).__name__}: {error}). The scores and the other loggers are not affected; "
                "call `scores.log(logger)` to try again.",
                stacklevel=2,
            )


def listening(loggers: Any) -> list[Any]:
    """The loggers that store what they receive; none on other ranks than zero."""
    # Lightning sets the rank on import; otherwise there is one process.
    if getattr(rank_zero_only, "rank", 0) != 0 or loggers is None:
        return []
    every = list(loggers) if isinstance(loggers, Iterable) and "Logger" not in _names(loggers) else [loggers]
    return [logger for logger in every if logger and "DummyLogger" not in _names(logger)]


def drawn(**draw: Callable[[], Any]) -> Mapping[str, Any]:
    """The figure that each function draws, by name. One that cannot be drawn is left out: scoring must not fail for it.

    Without matplotlib a message is logged; any other failure (an example that cannot be drawn) is a warning.
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
    # By name, since `pytorch_lightning` and `lightning.pytorch` have different classes, and trackers are optional.
    return [parent.__name__ for parent in type(logger).__mro__]


def _writer(logger: Any) -> Callable[[Any, TrackerResults], None]:
    return next((WRITERS[name] for name in _names(logger) if name in WRITERS), scalars.write)
