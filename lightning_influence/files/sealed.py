"""Arrow files with checksums of all their bytes, which are compared where the bytes are first used."""

import json
import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from lightning_influence.files.regular import check_regular

# Bytes per checksum: reading one row of a mapped file verifies at least this many.
CHUNK = 2**20
# A record batch's own description, before its columns, is far shorter.
_DESCRIPTION = 2**16
_MAGIC = b"lightning_influence checksums\n"
_ARROW_END = 10  # bytes: the length of Arrow's footer, and its magic word
_ALIGNED = 64
# Columns of 8 bytes in which a chunk is summed; no power of two, so that exchanged pages change the sums.
_WIDTH = 509


class DamagedFileError(ValueError):
    """A file does not hold what was written; the message names it."""


def seal(file: IO[bytes], batches: Sequence[int]) -> None:
    """Insert a table of checksums before the footer of a complete Arrow file, which stays one for every reader.

    Args:
        file: open for reading and writing.
        batches: where each record batch begins.
    """
    size = file.seek(0, 2)
    file.seek(size - _ARROW_END)
    body = size - _ARROW_END - int.from_bytes(file.read(4), "little")
    file.seek(body)
    footer = file.read()
    file.seek(0)
    sums = [_checksum(file.read(min(CHUNK, body - start))) for start in range(0, body, CHUNK)]
    table = {"body": body, "sums": sums, "batches": list(batches), "footer": zlib.crc32(footer)}
    text = json.dumps(table).encode()
    text += b" " * (-(len(text) + 12 + len(_MAGIC)) % _ALIGNED)
    text += len(text).to_bytes(8, "little")
    file.seek(body)
    file.write(text + zlib.crc32(text).to_bytes(4, "little") + _MAGIC + footer)


class SealedFile:
    """A file of ``seal``, mapped into memory; its description is verified at once, its values by ``check``.

    Writing to the mapped pages does not change the file.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        DamagedFileError: it is cut short, or its description has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path)
        with path.open("rb") as file:  # a private mapping counts as writable: torch warns about read-only memory
            self.pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._address = np.frombuffer(self.pages, np.uint8).ctypes.data
        self._table = self._read_table()
        self._checked: set[int] = set()
        if self._table is not None:
            first = self._table["batches"][:1] or [0]
            self.check(0, first[0] + _DESCRIPTION)
            for start in self._table["batches"][1:]:
                self.check(start, start + _DESCRIPTION)

    @property
    def sealed(self) -> bool:
        """Whether the file has checksums; files of earlier versions have none."""
        return self._table is not None

    def check(self, start: int = 0, stop: int | None = None) -> None:
        """Compare the checksums of the chunks that hold some bytes, each chunk once.

        Raises:
            DamagedFileError: one has changed.
        """
        if self._table is None:
            return
        body = self._table["body"]
        stop = body if stop is None else min(stop, body)
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            if chunk not in self._checked:
                part = memoryview(self.pages)[chunk * CHUNK : min((chunk + 1) * CHUNK, body)]
                if _checksum(part) != self._table["sums"][chunk]:
                    raise self._damaged(f"bytes {chunk * CHUNK} to {chunk * CHUNK + len(part)} have changed")
                self._checked.add(chunk)

    def check_tensor(self, tensor: Tensor) -> None:
        """Compare the checksums of a contiguous tensor's memory, which lies in the mapped pages.

        Raises:
            DamagedFileError: its values have changed since they were written.
        """
        self._check_memory(tensor.data_ptr(), tensor.numel() * tensor.element_size())

    def check_buffer(self, buffer: Any) -> None:
        """The same for a buffer of Arrow's.

        Raises:
            DamagedFileError: its bytes have changed since they were written.
        """
        self._check_memory(buffer.address, buffer.size)

    def _check_memory(self, address: int, size: int) -> None:
        if size:
            self.check(address - self._address, address - self._address + size)

    def _read_table(self) -> dict[str, Any] | None:
        size = len(self.pages)
        body_stop = size - _ARROW_END - int.from_bytes(self.pages[max(0, size - _ARROW_END) :][:4], "little")
        if self.pages[max(0, body_stop - len(_MAGIC)) : max(0, body_stop)] != _MAGIC:
            return None
        stop = body_stop - len(_MAGIC)
        length = int.from_bytes(self.pages[stop - 12 : stop - 4], "little")
        start = stop - 12 - length
        text = self.pages[max(0, start) : stop - 4]
        if start < 0 or zlib.crc32(text) != int.from_bytes(self.pages[stop - 4 : stop], "little"):
            raise self._damaged("its table of checksums has changed")
        table: dict[str, Any] = json.loads(text[:length])
        if table["body"] != start or table["footer"] != zlib.crc32(self.pages[body_stop:]):
            raise self._damaged("its footer has changed")
        return table

    def _damaged(self, what: str) -> DamagedFileError:
        return DamagedFileError(
            f"Expected {str(self.path)!r} as it was written, got a damaged file: {what}. Write it again, or restore it "
            "from a copy."
        )


def _checksum(part: bytes | memoryview) -> int:
    """A number that changes with every bit of some bytes, computed several times as fast as a CRC.

    It is the CRC of sums along columns, and of the bytes that do not fill a row.
    """
    words = np.frombuffer(part, "<u8", len(part) // 8)
    rows = len(words) // _WIDTH
    sums = words[: rows * _WIDTH].reshape(rows, _WIDTH).sum(0, dtype="<u8")
    return zlib.crc32(part[rows * _WIDTH * 8 :], zlib.crc32(sums.tobytes()))
