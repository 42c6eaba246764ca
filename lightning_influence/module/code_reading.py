"""What compiled Python code says: its instructions, and the names and modules that it reads."""

import dis
from collections.abc import Iterator
from modulefinder import ModuleFinder
from types import CodeType
from typing import Any

_IMPORT = dis.opmap["IMPORT_NAME"]
# What a function does, without where it is written.
_FIELDS = (
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_exceptiontable"),
)


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """Compiled code and what is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def written(code: CodeType) -> list[Any]:
    """What a function does."""
    return [
        [*(getattr(part, name, b"") for name in _FIELDS), *map(_constant, part.co_consts)] for part in codes_in(code)
    ]


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return "code"
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value


def names_in(code: CodeType) -> Iterator[str]:
    """The names that code reads, and text that may be one."""
    for part in codes_in(code):
        yield from part.co_names
        yield from (c for c in part.co_consts if isinstance(c, str) and c.isidentifier())


def imports_in(code: CodeType) -> Iterator[str]:
    """The modules that code imports when it runs, with a dot for each level of a relative import."""
    for part in codes_in(code):
        if _IMPORT in part.co_code[::2]:
            for kind, (*details, name) in ModuleFinder().scan_opcodes(part):  # type: ignore[attr-defined]
                if kind != "store":
                    yield "." * (details[0] if kind == "relative_import" else 0) + name
