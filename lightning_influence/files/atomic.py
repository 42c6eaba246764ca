"""Atomic writes: a reader finds the complete new file, the previous one, or none."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def whole(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """Yields an open file that replaces ``path`` when the context ends; where it fails, ``path`` is left as it was.

    Another process may write the same path at the same time: the last one to finish wins.

    Args:
        path: of the file.
        durable: wait until the content is on the disk, so that it outlives a power failure; a killed process leaves
            whole files either way. False saves several milliseconds: call ``sync`` later.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("x+b") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def sync(path: Path) -> None:
    """Waits until the content of a file is on the disk; one that was removed is none."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())
