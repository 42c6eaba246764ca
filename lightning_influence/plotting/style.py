"""What all figures share: no window, colours for light and dark backgrounds, texts cut to the space for them."""

import functools
import unicodedata
from typing import Any, NamedTuple

from lightning_influence.checks import optional

_AVERAGE = 0.57  # width of a character in the height of the font, of which hinting takes 5 %


class Palette(NamedTuple):
    """The colours of one figure."""

    text: str
    proponent: str
    opponent: str
    rest: str


def blank(width: float, height: float, instead: str = "read the scores with `to_arrow`") -> tuple[Any, Palette]:
    """A new figure of this many inches, without a window, and the colours for its background.

    Where matplotlib is missing, the error names what to do `instead`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with optional("matplotlib", "plot", "figures", instead):
        from matplotlib import colors, rcParams
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    red, green, blue = colors.to_rgb(figure.get_facecolor())
    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.4
    text = colors.to_hex(rcParams["text.color"])
    if dark:
        return figure, Palette(text, "#5fd3a4", "#ff8f73", "#8fa3bb")
    return figure, Palette(text, "#1b7f5c", "#c2452d", "#7d8da1")


def fit(text: str, width: float) -> str:
    """The text as one line that is as wide as at most `width` characters of average width."""
    text = " ".join(text.split())
    return _escaped(text if width_of(text) <= width else _beginning(text, width - width_of("…")) + "…")


def wrap(text: str, width: float, height: int) -> str:
    """The first `height` lines of a text, wrapped at `width` characters of average width; blank lines are kept."""
    lines: list[str] = []
    for part in text.splitlines():
        lines += _wrapped(part.split(), width, height + 1 - len(lines))
    if len(lines) > height:
        last = lines[height - 1]
        lines = [*lines[: height - 1], _beginning(last, width - width_of("…")) + "…"]
    return "\n".join(map(_escaped, lines))


def _wrapped(words: list[str], width: float, most: int) -> list[str]:
    """At most so many lines of some words, of which long ones are broken."""
    lines: list[str] = []
    line = ""
    while words and len(lines) < most:
        longer = f"{line} {words[0]}".strip()
        if width_of(longer) <= width:
            line = longer
            words = words[1:]
        elif line:
            lines.append(line)
            line = ""
        else:
            lines.append(_beginning(words[0], width))
            words = [words[0][len(lines[-1]) :], *words[1:]]
    return [*lines, line] if line or not lines else lines


def _beginning(text: str, width: float) -> str:
    """As much of a text as is not wider, but one character at least."""
    end, total = 0, 0.0
    while end < len(text) and (total := total + width_of(text[end])) <= width:
        end += 1
    return text[: max(1, end)]


def _escaped(line: str) -> str:
    return line.replace("$", r"\$")  # one that is not escaped would start a formula


def width_of(text: str) -> float:
    """How many characters of average width are as wide as the text."""
    return sum(map(_advance, text)) / _AVERAGE


@functools.lru_cache(maxsize=4096)
def _advance(character: str) -> float:
    """The width of a character in the height of the font."""
    if unicodedata.east_asian_width(character) in ("W", "F"):
        return 1.0  # in whatever font has it
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    font.set_size(10, 72)
    return float(font.load_char(ord(character)).linearHoriAdvance) / 2**16 / 10


def axis(quantity: str, units: str) -> str:
    """The label of an axis, such as "score (loss)"."""
    shown = "no unit" if units == "arbitrary" else units
    return quantity if not shown or shown in quantity else f"{quantity} ({shown})"
