"""Figures of queries with their strongest proponents and opponents."""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from lightning_influence.plotting.cell import Drawing, Item
from lightning_influence.plotting.style import Palette, axis, blank, fit
from lightning_influence.wording import counted

_Side: TypeAlias = tuple[str, str, Sequence[Item]]
"""Its title, its colour and its examples."""

_CELL = 1.55  # width of one picture in inches
_ROW = 5  # pictures side by side
_PLAIN = Drawing()


class Case(NamedTuple):
    """A query, without a score, and its proponents and opponents, strongest first; either may be empty."""

    query: Item
    proponents: Sequence[Item]
    opponents: Sequence[Item]

    @property
    def bare(self) -> bool:
        """Whether there are only names and scores to draw."""
        return all(item.example is None for item in (self.query, *self.proponents, *self.opponents))


def explanation(case: Case, *, method: str = "", units: str = "", drawing: Drawing = _PLAIN) -> tuple[Any, Any]:
    """Draw a query at the left, its proponents in the upper row and its opponents in the lower row, strongest first.

    An example is an image, a text, a vector, or a tuple or a dict that holds one, with its label; see
    `example_view.look_at`. Without any example, the scores are drawn as bars.

    Args:
        case: The query, its proponents with positive scores and its opponents with negative ones.
        method: For the title.
        units: Of the scores.
        drawing: How examples are drawn.

    Returns:
        The figure and its axes: those of the query, the proponents and the opponents, or the single axes of the bars.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: An example cannot be drawn, and there is no `render`.
    """
    title = f"{method + ': ' if method else ''}influence on query {case.query.name}"
    if case.bare:
        figure, colours = blank(6.4, _bars_height(case))
        return figure, _bars(figure.add_subplot(), case, title, units, colours, drawing)
    columns = max(len(case.proponents), len(case.opponents), 1)
    figure, colours = blank(_CELL * (columns + 1.5) + 0.4, 2 * _CELL + 1.9)
    figure.suptitle(textwrap.fill(fit(title, 120), 15 * (columns + 1), break_on_hyphens=False), fontsize=11)
    grid = figure.add_gridspec(2, columns + 2, width_ratios=[1.35, 0.12, *[1.0] * columns])
    subject = figure.add_subplot(grid[:, 0])
    drawing.draw(subject, case.query, colours.text, size=(31, 27))
    axes = [subject]
    for row, side in enumerate(_sides(case, colours)):
        axes += _cells(figure, [grid[row, 1 + column] for column in range(columns + 1)], side, drawing, fontsize=10)
    return figure, axes


def explanations(
    cases: Sequence[Case], *, method: str = "", units: str = "", drawing: Drawing = _PLAIN
) -> tuple[Any, list[Any]]:
    """Draw one row per query: itself, its proponents, its opponents; or one bar chart per query without any example.

    Returns:
        The figure and, for each query, the axes that `explanation` returns.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: An example cannot be drawn, and there is no `render`.
    """
    title = f"{method + ': ' if method else ''}influence on {counted(len(cases), 'query')}"
    if all(case.bare for case in cases):
        heights = [_bars_height(case) for case in cases]
        figure, colours = blank(6.4, sum(heights))
        figure.suptitle(fit(title, 70), fontsize=11)
        grid = figure.add_gridspec(len(cases), 1, height_ratios=heights)
        return figure, [
            _bars(figure.add_subplot(grid[row, 0]), case, f"query {case.query.name}", units, colours, drawing)
            for row, case in enumerate(cases)
        ]
    widths = [max(1, *(len(side) for side in sides)) for sides in zip(*(case[1:] for case in cases), strict=True)]
    figure, colours = blank(_CELL * (sum(widths) + 1.3) + 0.6, (_CELL + 0.75) * len(cases) + 0.8)
    figure.suptitle(fit(title, 14 * sum(widths) + 14), fontsize=11)
    ratios = [1.0, 0.12, *[1.0] * widths[0], 0.12, *[1.0] * widths[1]]
    grid = figure.add_gridspec(len(cases), len(ratios), width_ratios=ratios)
    every = []
    for row, case in enumerate(cases):
        axes = [figure.add_subplot(grid[row, 0])]
        drawing.draw(axes[0], case.query, colours.text)
        start = 1
        for side, width in zip(_sides(case, colours), widths, strict=True):
            places = [grid[row, start + column] for column in range(1 + width)]
            axes += _cells(figure, places, side, drawing, fontsize=9)
            start += 1 + width
        every.append(axes)
    return figure, every


def examples(items: Sequence[Item], *, title: str, drawing: Drawing = _PLAIN) -> tuple[Any, list[Any]]:
    """Draw examples one after another, in rows of five.

    Returns:
        The figure and the axes of each example.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: An example cannot be drawn, and there is no `render`.
    """
    columns = min(_ROW, len(items))
    rows = -(-len(items) // _ROW)
    figure, colours = blank(_CELL * max(columns, 3) + 0.4, (_CELL + 0.85) * rows + 0.6)
    figure.suptitle(textwrap.fill(fit(title, 160), 16 * max(columns, 3), break_on_hyphens=False), fontsize=11)
    grid = figure.add_gridspec(rows, columns)
    axes = [figure.add_subplot(grid[divmod(at, columns)]) for at in range(len(items))]
    for place, item in zip(axes, items, strict=True):
        drawing.draw(place, item, colours.text, signed=False)
    return figure, axes


def _sides(case: Case, colours: Palette) -> tuple[_Side, _Side]:
    return ("Proponents", colours.proponent, case.proponents), ("Opponents", colours.opponent, case.opponents)


def _cells(figure: Any, places: Sequence[Any], side: _Side, drawing: Drawing, fontsize: int) -> list[Any]:
    """Draw the title of one side into the first place, and its examples or the word "none" into the others."""
    title, colour, items = side
    margin = figure.add_subplot(places[0])
    margin.axis("off")
    margin.text(0.5, 0.5, title, rotation=90, color=colour, ha="center", va="center", fontsize=fontsize)
    if not items:
        cell = figure.add_subplot(places[1])
        cell.axis("off")
        cell.text(0.5, 0.5, "none", color="grey", ha="center", va="center")
        return []
    axes = []
    for place, item in zip(places[1:], items, strict=False):
        axes.append(figure.add_subplot(place))
        drawing.draw(axes[-1], item, colour)
    return axes


def _bars_height(case: Case) -> float:
    return 1.5 + 0.28 * max(len(case.proponents) + len(case.opponents), 2)


def _bars(axes: Any, case: Case, title: str, units: str, colours: Palette, drawing: Drawing) -> Any:
    items = [*case.proponents, *reversed(case.opponents)]
    scores = [0.0 if item.score is None else item.score for item in items]
    axes.barh(range(len(items)), scores, color=[colours.proponent if s > 0 else colours.opponent for s in scores])
    axes.set_yticks(range(len(items)), [fit(item.name, 32) for item in items])
    axes.invert_yaxis()
    axes.axvline(0, color=colours.text, linewidth=0.8)
    axes.set_xlabel(fit(axis("score", units), 60))
    axes.set_ylabel("training example")
    told = ", ".join(case.query.opinion(drawing))
    axes.set_title("\n".join([fit(title, 70), *([fit(told, 70)] if told else [])]), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
