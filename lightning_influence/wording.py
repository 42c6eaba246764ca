"""Numbers of things in words."""

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
