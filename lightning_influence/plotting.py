"""Examples and their influence as figures; matplotlib is asked for when one is drawn, and no window is touched."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Render: TypeAlias = Callable[[Any, Any], None]
"""Called with (axes, example); draws the example, whatever it is."""

_PROPONENT, _OPPONENT = "#1b7f5c", "#c2452d"
_CELL = 1.55  # inches a picture is wide
_NAME = 20  # characters of an id or a label that fit above a picture


class Item(NamedTuple):
    """One example to draw: what it is called, its score (None for the query) and itself, where it is at hand."""

    name: str
    score: float | None = None
    example: Any = None


def explanation(
    query: Item,
    proponents: Sequence[Item],
    opponents: Sequence[Item],
    *,
    method: str = "",
    units: str = "",
    render: Render | None = None,
    labels: Sequence[str] | None = None,
) -> tuple[Any, Any]:
    """A query at the left, its proponents in the row above and its opponents in the row below, strongest first.

    An example is an image (a [C, H, W], [H, W, C] or [H, W] tensor or array), a text, or a tuple or a dict that holds
    one, with its label. Where none is at hand, the scores are drawn as bars.

    Args:
        query: Without a score.
        proponents: With positive scores; may be empty.
        opponents: With negative scores; may be empty.
        method: For the title.
        units: Of the scores.
        render: Draws an example into its axes, instead of what is built in.
        labels: Names of the classes, by number.

    Returns:
        The figure and its axes: the query's, then the proponents' and the opponents', or the one of the bars.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: An example is neither an image nor a text and there is no `render`.
    """
    title = f"{method + ': ' if method else ''}influence on query {query.name}"
    if all(item.example is None for item in (query, *proponents, *opponents)):
        return _bars([*proponents, *reversed(opponents)], title, units)
    columns = max(len(proponents), len(opponents), 1)
    figure = _figure(_CELL * (columns + 1.5) + 0.4, 2 * _CELL + 1.9)
    figure.suptitle(textwrap.fill(_fit(title, 120), 15 * (columns + 1)), fontsize=11)
    grid = figure.add_gridspec(2, columns + 2, width_ratios=[1.35, 0.12, *[1.0] * columns])
    subject = figure.add_subplot(grid[:, 0])
    _draw(subject, query, render, labels, page=(31, 27))
    axes = [subject]
    for row, (side, colour, items) in enumerate(
        (("Proponents", _PROPONENT, proponents), ("Opponents", _OPPONENT, opponents))
    ):
        margin = figure.add_subplot(grid[row, 1])
        margin.axis("off")
        margin.text(0.5, 0.5, side, rotation=90, color=colour, ha="center", va="center", fontsize=10)
        for column, item in enumerate(items):
            cell = figure.add_subplot(grid[row, column + 2])
            _draw(cell, item, render, labels, colour)
            axes.append(cell)
        if not items:
            figure.add_subplot(grid[row, 2]).axis("off")
            figure.axes[-1].text(0.5, 0.5, "none", color="grey", ha="center", va="center")
    return figure, axes


def self_influence(
    values: Tensor, flagged_fraction: float = 0.1, *, method: str = "", units: str = ""
) -> tuple[Any, Any]:
    """The distribution of self-influence, with its highest fraction marked as worth a look.

    Args:
        values: [train] scores.
        flagged_fraction: Between 0 and 1; at least one example is marked.
        method: For the title.
        units: Of the scores.

    Returns:
        The figure and its axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `flagged_fraction` is not between 0 and 1.
    """
    if not 0 < flagged_fraction < 1:
        raise ValueError(f"Expected `flagged_fraction` between 0 and 1, got {flagged_fraction!r}.")
    flagged = max(1, round(flagged_fraction * values.numel()))
    threshold = float(values.topk(flagged).values[-1])
    low, high = float(values.min()), float(values.max())
    figure = _figure(6.4, 3.4)
    axes = figure.add_subplot()
    # An edge at the threshold, so that no bar stands half inside the tail.
    width = (high - low) / min(60, max(10, values.numel() // 8)) or 1.0
    parts = (
        ("others", "#7d8da1", values[values < threshold], _edges(low, threshold, width)),
        ("highest", _OPPONENT, values[values >= threshold], _edges(threshold, high, width)),
    )
    tallest = 0.0
    for name, colour, part, edges in parts:
        if part.numel():
            bars = axes.hist(part.double().numpy(), bins=edges, color=colour, label=f"{part.numel():,} {name}")[0]
            tallest = max(tallest, float(bars.max()))
    if tallest > 100:
        # The tail is what one looks for, and it may be a thousand times rarer than the rest.
        axes.set_yscale("symlog", linthresh=10)
        axes.set_ylim(bottom=0)
    else:
        axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(_fit(f"self-influence ({units})" if units else "self-influence", 70))
    axes.set_ylabel("training examples")
    title = f"{method + ': ' if method else ''}self-influence of {values.numel():,} training examples"
    axes.set_title(_fit(title, 80), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure, axes


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Figures need matplotlib. Run `pip install "lightning-influence[plot]"`, or read the scores by '
            "`to_arrow` instead."
        ) from error
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def _edges(low: float, high: float, width: float) -> list[float]:
    if high <= low:
        return [low - width / 2, low + width / 2]
    count = max(1, round((high - low) / width))
    return [low + (high - low) * i / count for i in range(count)] + [high]


def _bars(items: Sequence[Item], title: str, units: str) -> tuple[Any, Any]:
    figure = _figure(6.4, 1.3 + 0.28 * max(len(items), 2))
    axes = figure.add_subplot()
    scores = [0.0 if item.score is None else item.score for item in items]
    axes.barh(range(len(items)), scores, color=[_PROPONENT if score > 0 else _OPPONENT for score in scores])
    axes.set_yticks(range(len(items)), [_fit(item.name, 32) for item in items])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(_fit(f"score ({units})" if units else "score", 60))
    axes.set_ylabel("training example")
    axes.set_title(_fit(title, 70), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw(
    axes: Any,
    item: Item,
    render: Render | None,
    labels: Sequence[str] | None,
    colour: str = "black",
    page: tuple[int, int] = (24, 11),
) -> None:
    content, label = _parts(item.example)
    lines = [_fit(item.name if item.score is not None else f"query {item.name}", _NAME)]
    if item.score is not None:
        lines.append(f"{item.score:+.3g}")
    if label is not None:
        lines.append(_fit(_class_name(label, labels), _NAME))
    axes.set_title("\n".join(lines), fontsize=8, color=colour)
    axes.set_xticks([])
    axes.set_yticks([])
    if item.example is None:
        axes.axis("off")
    elif render is not None:
        render(axes, item.example)
    elif isinstance(content, str):
        place = {"va": "top", "ha": "left", "transform": axes.transAxes}
        # Clipped, since some letters are wider than those that the page was measured with.
        axes.text(0.04, 0.97, _page(content, *page), fontsize=7, clip_on=True, **place)
    elif getattr(content, "ndim", None) == 1 and hasattr(content, "__array__"):
        _row(axes, torch.as_tensor(content).detach().cpu().double(), page)
    else:
        axes.imshow(_image(content), cmap="gray", interpolation="nearest")


def _row(axes: Any, values: torch.Tensor, page: tuple[int, int]) -> None:
    """A short row of a table as its numbers, a longer signal as a curve."""
    if len(values) > page[0]:
        axes.plot(values.numpy(), linewidth=0.8)
        return
    text = "  ".join(f"{value:.3g}" for value in values.tolist())
    place = {"va": "top", "ha": "left", "transform": axes.transAxes}
    axes.text(0.04, 0.97, _page(text, *page), fontsize=7, clip_on=True, **place)


def _class_name(label: Any, labels: Sequence[str] | None) -> str:
    if isinstance(label, str):
        return label
    if labels is not None and isinstance(label, int) and 0 <= label < len(labels):
        return str(labels[label])
    return f"label {label}"


def _parts(example: Any) -> tuple[Any, Any]:
    """What to draw of an example, and its label."""
    content: Any
    label: Any
    if isinstance(example, Mapping):
        label = next((example[key] for key in ("label", "labels", "y", "target") if key in example), None)
        content = next((v for v in example.values() if isinstance(v, str) or getattr(v, "ndim", 0) >= 2), None)
    elif isinstance(example, (tuple, list)) and len(example) > 1:
        content, label = example[0], example[1]
    else:
        content, label = (example[0] if isinstance(example, (tuple, list)) and example else example), None
    if getattr(label, "ndim", None) == 0 and hasattr(label, "item"):
        label = label.item()
    return content, label if isinstance(label, (int, float, str)) else None


def _image(content: Any) -> Any:
    """[H, W] or [H, W, 3] numbers from 0 to 1."""
    image = torch.as_tensor(content).detach().cpu().double() if hasattr(content, "__array__") else None
    if image is not None and image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[2] not in (3, 4):
        image = image.movedim(0, 2)
    if image is None or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        shape = list(getattr(content, "shape", ()))
        raise ValueError(
            f"Expected an image of shape [C, H, W], [H, W, C] or [H, W] or a text to draw, got "
            f"{type(content).__name__} of shape {shape}. Pass `render=`, called with (axes, example)."
        )
    if image.ndim == 3:
        # Channels beyond three are no transparency once data were normalised.
        image = image[:, :, 0] if image.shape[2] == 1 else image[:, :, :3]
    low, high = image.min(), image.max()
    if low < 0 or high > 1:
        image = (image - low) / (high - low).clamp(min=1e-12)
    return image.numpy()


def _fit(text: str, width: int) -> str:
    text = " ".join(text.split())
    # A dollar sign would open a formula.
    return (text if len(text) <= width else text[: width - 1] + "…").replace("$", r"\$")


def _page(text: str, width: int, height: int) -> str:
    """The first lines of a text; blank ones and their breaks are kept."""
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part.strip(), width) or [""]]
    if len(lines) > height:
        lines = [*lines[: height - 1], lines[height - 1][: width - 1] + "…"]
    return "\n".join(line.replace("$", r"\$") for line in lines)
