"""Keeps errors of trackers away from the fit."""

from collections.abc import Callable
from typing import Any


class ErrorGuard:
    """Context manager in which an exception ends the tracking instead of the fit."""

    def __init__(self, lose: Callable[[str], None]) -> None:
        self._lose = lose

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self._lose(f"{type(error).__name__}: {error}")
            return True
        return False
