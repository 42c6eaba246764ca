"""Scores as a few lines of HTML, for notebooks."""

import re
from collections.abc import Sequence
from html import escape

_CELL = 'style="text-align: left; padding-right: 1em"'


def unbroken(text: str) -> str:
    """The text with abbreviations such as EK-FAC held together by hyphens at which no line ends."""
    return re.sub(r"(?<=\b[A-Z])([A-Z]*)-(?=[A-Z0-9])", "\\1\u2011", text)


def snippet(paragraph: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A paragraph above a small table. Everything given is text and is escaped."""
    head = "".join(f"<th {_CELL}>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td {_CELL}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    text = escape(unbroken(paragraph)).replace("\nNote: ", "<br>Note: ")
    return f'<div><p style="max-width: 60em">{text}</p>{table}</div>'
