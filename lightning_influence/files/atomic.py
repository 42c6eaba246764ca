"""Atomic writes: a reader finds the complete new file, the previous one, or none."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

with contextlib.suppress(ImportError):  # not on Windows
    import fcntl

_PARTIAL = ".*.tmp"


@contextlib.contextmanager
def whole(path: Path, durable: bool = True, named: Callable[[IO[bytes]], Path] | None = None) -> Iterator[IO[bytes]]:
    """Yields an open file that replaces ``path`` when the context ends; where it fails, ``path`` is left as it was.

    Threads and processes may write the same path at the same time: the last one to finish wins.

    Args:
        path: of the file.
        durable: wait until the content is on the disk, so that it outlives a power failure; a killed process leaves
            whole files either way. False saves several milliseconds: call ``sync`` later.
        named: gives another path, from the complete file.

    Raises:
        OSError: it could not be written; ``filename`` is the path.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("x+b") as file:
            _hold(file)
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if named is not None:
                path = named(file)
        os.replace(partial, path)
    except BaseException as error:
        _remove(partial)
        cause = _of_the_system(error)
        if cause is not None and cause.errno is not None and cause.filename in (None, str(partial)):
            raise type(cause)(cause.errno, cause.strerror, str(path)) from error
        raise


def sync(path: Path) -> None:
    """Waits until the content of a file is on the disk; one that was removed is none."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())


def left_over(folder: Path) -> list[Path]:
    """The unfinished files that killed processes have left in a folder, at any depth."""
    return [path for path in sorted(folder.rglob(_PARTIAL)) if path.is_file() and not _is_held(path)]


def _hold(file: IO[bytes]) -> None:
    """Lock a file as long as it is open, so that nobody takes it for left over."""
    with contextlib.suppress(NameError, OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except NameError:
        return False
    except OSError:
        return True
    return False


def _of_the_system(error: BaseException) -> OSError | None:
    """The error itself, or the one behind it: torch hides a full disk in an error of its own."""
    behind = error.__context__ if isinstance(error, RuntimeError) else error
    return behind if isinstance(behind, OSError) else None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
