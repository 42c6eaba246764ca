"""Plain-text tables and file sizes."""

import io
from collections.abc import Sequence
from typing import IO, Any

from lightning_influence.plotting.example_view import printable


def table(names: Sequence[str], rows: Sequence[Sequence[Any]], indent: str = "  ") -> str:
    """Rows as a plain-text table; columns of numbers are right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(names), *cells]) for i in range(len(names))]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(names))
    ]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in [list(names), *cells]
    ]
    return "\n".join(indent + line for line in lines)


class Printable(io.TextIOBase):
    """A stream that passes text on without control characters: files may hold escapes for the terminal.

    Args:
        stream: where the text goes.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text."""
        return self._stream.write(printable(text))

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


def megabytes(size: int) -> str:
    """A number of bytes in kB or MB."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
