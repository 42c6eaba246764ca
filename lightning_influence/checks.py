"""Checks of arguments: each raises, naming the argument, what was expected and what came."""

from collections.abc import Sequence
from typing import Any


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises ValueError where ``value`` is none of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_integer(name: str, value: object, least: int = 1, optional: bool = False) -> None:
    """Raises ValueError where ``value`` is not an integer of at least ``least`` (or None, where it is optional).

    ``True`` and ``1.0`` are not integers here: they are nearly always another argument in the wrong place.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"Expected `{name}` to be {what}{' or None' if optional else ''}, got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Raises ValueError where ``value`` is not a positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"Expected `{name}` to be a positive number, got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError where ``value`` is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be True or False, got {value!r}.")


def check_callable(name: str, value: Any) -> None:
    """Raises TypeError where ``value`` is neither a function nor None."""
    if value is not None and not callable(value):
        raise TypeError(f"Expected `{name}` to be a function or None, got {value!r}.")
