"""What all figures share: no window, colours for light and dark backgrounds, texts cut to the space for them."""

import textwrap
from typing import Any, NamedTuple

from lightning_influence.checks import optional


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


def fit(text: str, width: int) -> str:
    """The text as one line of at most `width` characters."""
    text = " ".join(text.split())
    # An unescaped dollar sign would start a formula.
    return (text if len(text) <= width else text[: width - 1] + "…").replace("$", r"\$")


def wrap(text: str, width: int, height: int) -> str:
    """The first `height` lines of a text, wrapped at `width`; blank lines are kept."""
    lines = [
        line
        for part in text.splitlines()
        for line in textwrap.wrap(part.strip(), width, break_on_hyphens=False) or [""]
    ]
    if len(lines) > height:
        lines = [*lines[: height - 1], lines[height - 1][: width - 1] + "…"]
    return "\n".join(line.replace("$", r"\$") for line in lines)


def axis(quantity: str, units: str) -> str:
    """The label of an axis, such as "score (loss)"."""
    shown = "no unit" if units == "arbitrary" else units
    return quantity if not shown or shown in quantity else f"{quantity} ({shown})"
