"""Checks of arguments and optional packages: each raises an error that names what was expected and what was found."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
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


def check_positive(name: str, value: object, hint: str = "") -> None:
    """Raises ValueError where ``value`` is not a positive number; the message ends with ``hint``, the way out."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"Expected `{name}` to be a positive number, got {value!r}. {hint}".rstrip())


def check_fraction(name: str, value: object) -> None:
    """Raises ValueError where ``value`` is not a number above 0 and below 1."""
    if not isinstance(value, float) or not 0 < value < 1:
        raise ValueError(f"Expected `{name}` to be a number between 0 and 1, got {value!r}.")


def check_at_least_0(name: str, value: object, below: float = math.inf, optional: bool = False, hint: str = "") -> None:
    """Raises ValueError where ``value`` is not a number of at least 0 and below ``below`` (or None, where optional)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
        what = "a finite number of at least 0" if below == math.inf else f"a number of at least 0 and below {below}"
        what += " or None" if optional else ""
        raise ValueError(f"Expected `{name}` to be {what}, got {value!r}. {hint}".rstrip())


def check_flag(name: str, value: object) -> None:
    """Raises TypeError where ``value`` is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be True or False, got {value!r}.")


def check_callable(name: str, value: Any) -> None:
    """Raises TypeError where ``value`` is neither a function nor None."""
    if value is not None and not callable(value):
        raise TypeError(f"Expected `{name}` to be a function or None, got {value!r}.")


def check_instance(name: str, value: Any, attribute: str, what: str, hint: str) -> None:
    """Raises TypeError where ``value`` is a class, or is without what ``what`` has; the message ends with ``hint``."""
    if isinstance(value, type) or not hasattr(value, attribute):
        raise TypeError(f"Expected `{name}` to be {what}, got {value!r}. {hint}")


def check_path_like(name: str, value: Any, hint: str) -> None:
    """Raises TypeError where ``value`` is no path, ValueError where it is empty; the message ends with ``hint``."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"Expected `{name}` to be a path, got {value!r}. {hint}")
    if not os.fspath(value):
        raise ValueError(f"Expected `{name}` to be a path, got ''. {hint}")


def check_not_empty(name: str, value: Any) -> None:
    """Raises where ``value`` is a single number or a collection without any item; None stands for a default.

    Raises:
        TypeError: a number.
        ValueError: no item.
    """
    if isinstance(value, (int, float)):
        raise TypeError(f"Expected `{name}` to be a list or None, got {value!r}. Write `{name}=[{value!r}]`.")
    if hasattr(value, "__len__") and len(value) == 0:
        raise ValueError(f"Expected `{name}` to have an item at least, or to be None, got {value!r}. Leave it out.")


@contextlib.contextmanager
def optional(package: str, extra: str, purpose: str, instead: str) -> Iterator[None]:
    """Raises ImportError, naming the extra to install and the way out without it, where an import inside fails."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"Expected {package} to be installed for {purpose}. "
            f'Run `pip install "lightning-influence[{extra}]"`, or {instead}.'
        ) from error


def check_examples(examples: Iterable[int] | None) -> tuple[int, ...] | None:
    """The field ``examples``, ascending and without repetitions."""
    if examples is not None and not isinstance(examples, Iterable):
        raise TypeError(f"Expected `examples` to be ids of training examples or None, got {examples!r}.")
    return None if examples is None else tuple(sorted({int(i) for i in examples}))
