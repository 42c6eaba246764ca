"""Text without control characters, and file sizes."""

import io
from typing import IO

from lightning_influence.plotting.example_view import printable


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
