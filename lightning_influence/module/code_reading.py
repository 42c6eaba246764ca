"""What compiled Python code says: its instructions, and the names and modules that it reads."""

import dis
from collections.abc import Iterator
from types import CodeType
from typing import Any

_IMPORT = dis.opmap["IMPORT_NAME"]


def written(code: CodeType) -> tuple[Any, ...]:
    """What a function does, without where it is written."""
    consts = [written(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    variables = code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    return (
        code.co_code,
        code.co_names,
        *variables,
        consts,
        code.co_flags,
        *counts,
        getattr(code, "co_exceptiontable", b""),
    )


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def names_in(code: CodeType) -> Iterator[str]:
    """The names that code reads, and text that may be one."""
    for part in _codes(code):
        yield from part.co_names
        yield from (c for c in part.co_consts if isinstance(c, str) and c.isidentifier())


def imports_in(code: CodeType) -> Iterator[str]:
    """The modules that code imports when it runs, with a dot for each level of a relative import."""
    for part in _codes(code):
        if _IMPORT in part.co_code[::2]:
            steps = [step for step in dis.get_instructions(part) if step.opname not in ("EXTENDED_ARG", "CACHE")]
            for position, step in enumerate(steps):
                if step.opcode == _IMPORT:
                    yield "." * steps[position - 2].argval + step.argval
