"""Keeps what goes wrong in tracking from a fit."""

from collections.abc import Callable
from typing import Any


class ErrorGuard:
    """Training matters more than what is tracked of it: whatever goes wrong ends the tracking."""

    def __init__(self, lose: Callable[[str], None]) -> None:
        self._lose = lose

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self._lose(f"{type(error).__name__}: {error}")
            return True
        return False
