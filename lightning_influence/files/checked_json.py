"""JSON files with a checksum of their content."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

_CONTENT, _CHECKSUM = "manifest", "crc32"


def encode(content: Mapping[str, Any]) -> bytes:
    """The content as JSON beside its checksum."""
    text = _text(content)  # without `indent`, which is ten times slower
    return b'{"%b": %d, "%b": %b}' % (_CHECKSUM.encode(), zlib.crc32(text), _CONTENT.encode(), text)


def decode(file: bytes, plain: bool = False) -> dict[str, Any] | None:
    """The content, or None if the file is damaged.

    Args:
        file: what ``encode`` gave.
        plain: accept the content without a checksum, as earlier versions wrote it.
    """
    try:
        outer = json.loads(file)
        if plain and isinstance(outer, dict) and not outer.keys() & {_CONTENT, _CHECKSUM}:
            return outer
        content = outer[_CONTENT]
        whole = isinstance(content, dict) and zlib.crc32(_text(content)) == outer[_CHECKSUM]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if whole and file in (encode(content), _indented(outer)) else None


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _indented(outer: Mapping[str, Any]) -> bytes:
    """As earlier versions wrote it."""
    return json.dumps(outer, indent=1, sort_keys=True).encode()
