"""Numbers of things in words."""

import dataclasses
from collections.abc import Iterator
from typing import Any

_VERBS = {"is": "are", "was": "were", "has": "have"}


def counted(number: int, what: str, then: str = "") -> str:
    """A number of things, such as "1 query", "1,000 queries" or, with a verb that follows them, "2 queries have".

    Args:
        number: How many.
        what: One of them; its last word changes.
        then: The verb for one.
    """
    text = f"{number:,} {what if number == 1 else plural(what)}"
    return f"{text} {then if number == 1 else _VERBS.get(then, then.removesuffix('s'))}".rstrip()


def plural(what: str) -> str:
    """The plural of a noun, such as "losses" or "training examples"."""
    if what.endswith("y") and what[-2:-1] not in tuple("aeiou"):
        return f"{what[:-1]}ies"
    return f"{what}es" if what.endswith(("s", "x", "ch", "sh")) else f"{what}s"


def brief(value: Any) -> str:
    """A dataclass, such as a method, as code without the arguments that are at their defaults; others as `repr`."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type) or "__repr__" not in vars(type(value)):
        return repr(value)
    return f"{type(value).__qualname__}({', '.join(f'{name}={brief(one)}' for name, one in not_default(value))})"


def not_default(value: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass with other values than by default."""
    for field in dataclasses.fields(value):
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        one = getattr(value, field.name)
        if field.init and field.repr and repr(one) != repr(made):
            yield field.name, one
