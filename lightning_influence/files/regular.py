"""Reads of whole files whose names another file gives: never what is endless, blocks, or is mostly a hole."""

import os
import stat
from pathlib import Path

_TAIL = 32


def check_regular(path: Path) -> int:
    """The size of a file.

    Raises:
        OSError: it is missing, or no file: a device, a pipe, a folder, a loop of links.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(None, "something else than a file", str(path))
    return found.st_size


def read_regular(path: Path, size: int, exactly: bool = False) -> bytes:
    """The content of a file, whose size is looked at first.

    Args:
        path: of the file.
        size: the largest that is read.
        exactly: a smaller one is refused as well.

    Raises:
        OSError: it is missing, or no file.
        ValueError: it has another size, or ends in a hole: all formats here end in other bytes than zeros.
    """
    found = check_regular(path)
    if found > size or (exactly and found != size):
        raise ValueError(f"{found} bytes, the file is damaged")
    with path.open("rb") as file:
        if found > _TAIL:
            file.seek(-_TAIL, os.SEEK_END)
            if not any(file.read()):
                raise ValueError("a file with nothing at its end, it is damaged")
            file.seek(0)
        return file.read(found)
