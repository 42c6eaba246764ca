"""Scalars, tables, histograms and figures into whatever loggers a Trainer has."""

from __future__ import annotations

import csv
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

Table: TypeAlias = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""Names of the columns, and the rows."""

_MARKDOWN_ROWS = 200  # TensorBoard renders a text as one page
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pages:
    """What is written, by what it shows."""

    name: str
    step: int | None
    scalars: Mapping[str, float]
    tables: Mapping[str, Table]
    figures: Mapping[str, Any]
    histograms: Mapping[str, Tensor]


def log_influence(
    loggers: Any,
    name: str,
    scalars: Mapping[str, float],
    table: Table | None = None,
    figure: Any = None,
    self_table: Table | None = None,
    histogram: Tensor | None = None,
    step: int | None = None,
    self_figure: Any = None,
) -> None:
    """Write one method's results into every logger, each as far as it can show them.

    A logger that fails is warned about by name; the others still get theirs. Off rank zero, without loggers and under
    `fast_dev_run` nothing happens.

    Args:
        loggers: `trainer.loggers`, or one logger of either Lightning package.
        name: Of the method; everything stands under `influence/<name>/`.
        scalars: Name to number.
        table: Proponents and opponents.
        figure: An explanation, as a `matplotlib.figure.Figure`.
        self_table: The training examples of highest self-influence.
        histogram: [train] self-influence.
        step: The x-axis.
        self_figure: The distribution of self-influence.
    """
    pages = _Pages(
        name=name,
        step=step,
        scalars={key: float(value) for key, value in scalars.items()},
        tables=_given(scores=table, self_influence=self_table),
        figures=_given(explanation=figure, self_influence=self_figure),
        histograms=_given(self_influence=histogram),
    )
    for logger in listening(loggers):
        try:
            _writer(logger)(logger, pages)
        except Exception as error:  # whatever a tracker may raise (network, quota, disk) is not worth the scores
            warnings.warn(
                f"`{type(logger).__name__}` did not take the influence of {name!r} "
                f"({type(error).__name__}: {error}). The scores and the other loggers are not affected; "
                "call `scores.log(logger)` to try again.",
                stacklevel=2,
            )


def listening(loggers: Any) -> list[Any]:
    """The loggers that keep what they are given; none off rank zero."""
    # Lightning sets the rank when it is imported; without it there is one process.
    if getattr(rank_zero_only, "rank", 0) != 0 or loggers is None:
        return []
    every = list(loggers) if isinstance(loggers, Iterable) and not _names(loggers) & {"Logger"} else [loggers]
    return [logger for logger in every if logger and "DummyLogger" not in _names(logger)]


def drawn(draw: Callable[[], Any]) -> Any:
    """What `draw` draws, or None where it cannot: a picture is not worth the scores.

    Without matplotlib that is a note; any other failure (an example that cannot be drawn) is a warning.
    """
    try:
        return draw()
    except ImportError as error:
        _log.warning("No figure was logged: %s", error)
    except Exception as error:
        warnings.warn(
            f"No figure was logged ({type(error).__name__}: {error}). Pass `render=` to draw your examples.",
            stacklevel=3,
        )
    return None


def _given(**parts: Any) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if part is not None}


def _names(logger: Any) -> set[str]:
    # By name, since `pytorch_lightning` and `lightning.pytorch` have classes of their own, and trackers are optional.
    return {parent.__name__ for parent in type(logger).__mro__}


def _writer(logger: Any) -> Callable[[Any, _Pages], None]:
    writers = {"TensorBoardLogger": _to_tensorboard, "CSVLogger": _to_csv}
    return next((write for name, write in writers.items() if name in _names(logger)), _to_any)


def _write_scalars(logger: Any, pages: _Pages) -> None:
    between = getattr(logger, "group_separator", "/")
    prefix = between.join(["influence", pages.name, ""])
    logger.log_metrics({prefix + key: value for key, value in pages.scalars.items()}, step=pages.step)


def _to_any(logger: Any, pages: _Pages) -> None:
    _write_scalars(logger, pages)
    rest = [*pages.tables, *pages.figures]
    if rest:
        _log.warning("`%s` got the scalars of the influence of %r only.", type(logger).__name__, pages.name)
    logger.save()


def _to_tensorboard(logger: Any, pages: _Pages) -> None:
    _write_scalars(logger, pages)
    writer, head = logger.experiment, f"influence/{pages.name}"
    for what, table in pages.tables.items():
        writer.add_text(f"{head}/{what}", _markdown(table), pages.step)
    for what, values in pages.histograms.items():
        writer.add_histogram(f"{head}/{what}", values[values.isfinite()].numpy(), pages.step)
    for what, figure in pages.figures.items():
        writer.add_figure(f"{head}/{what}", figure, pages.step, close=False)
    writer.flush()


def _to_csv(logger: Any, pages: _Pages) -> None:
    # First: a writer that is only made now clears a folder that holds files.
    _write_scalars(logger, pages)
    logger.save()
    name = re.sub(r"[^\w.-]+", "_", pages.name)
    for what, (columns, rows) in pages.tables.items():
        text = io.StringIO(newline="")
        csv.writer(text).writerows([columns, *rows])
        _write(f"{logger.log_dir}/influence_{name}_{what}.csv", text.getvalue().encode())
    for what, figure in pages.figures.items():
        image = io.BytesIO()
        figure.savefig(image, format="png")
        _write(f"{logger.log_dir}/influence_{name}_{what}.png", image.getvalue())


def _write(path: str, content: bytes) -> None:
    # Loggers write where fsspec reaches, not only on this disk. It comes with Lightning, hence with any logger.
    import fsspec

    with fsspec.open(path, "wb") as file:
        file.write(content)


def _markdown(table: Table) -> str:
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows[:_MARKDOWN_ROWS]]
    text = "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)
    left = len(rows) - _MARKDOWN_ROWS
    return text if left <= 0 else f"{text}\n\n{left:,} more rows: `scores.to_arrow(k)` has them all."


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", r"\|").replace("\n", " ")
