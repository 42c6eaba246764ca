"""Figures of many scores: how one number per example is distributed, and the influence of classes on classes."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_influence.plotting.style import axis, blank, fit
from lightning_influence.wording import counted

_WRITTEN = 150  # the most cells of a map whose numbers are written into them


def self_influence(
    values: Tensor,
    flagged_fraction: float = 0.1,
    *,
    method: str = "",
    units: str = "",
    quantity: str = "self-influence",
) -> tuple[Any, Any]:
    """Draw the distribution of self-influence or of losses, with the highest fraction marked for review.

    Args:
        values: [train] scores.
        flagged_fraction: Between 0 and 1; at least one example is marked.
        method: For the title.
        units: Of the scores.
        quantity: What they are, in words.

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
    figure, colours = blank(6.4, 3.4)
    axes = figure.add_subplot()
    # An edge at the threshold, so that no bar lies half inside the tail.
    width = (high - low) / min(60, max(10, values.numel() // 8)) or 1.0
    parts = (
        ("others", colours.rest, values[values < threshold], _edges(low, threshold, width)),
        ("highest", colours.opponent, values[values >= threshold], _edges(threshold, high, width)),
    )
    tallest = 0.0
    for name, colour, part, edges in parts:
        if part.numel():
            bars = axes.hist(part.double().numpy(), bins=edges, color=colour, label=f"{part.numel():,} {name}")[0]
            tallest = max(tallest, float(bars.max()))
    if tallest > 100:
        # The tail is what matters, and it may be a thousand times rarer than the rest.
        axes.set_yscale("symlog", linthresh=10)
        axes.set_ylim(bottom=0)
    else:
        axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(fit(axis(quantity, units), 70))
    axes.set_ylabel("training examples")
    title = f"{method + ': ' if method else ''}{quantity} of {counted(values.numel(), 'training example')}"
    axes.set_title(fit(title, 80), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure, axes


def by_class(
    means: Tensor, train_classes: Sequence[str], query_classes: Sequence[str], *, method: str = "", units: str = ""
) -> tuple[Any, Any]:
    """Draw how the training examples of each class influence the queries of each class, as a map of means.

    Args:
        means: [query class, train class] mean scores; NaN where there is no pair.
        train_classes: Their names.
        query_classes: Their names.
        method: For the title.
        units: Of the scores.

    Returns:
        The figure and its axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows, columns = means.shape
    figure, colours = blank(2.6 + 0.5 * max(columns, 4), 2.0 + 0.36 * max(rows, 3))
    axes = figure.add_subplot()
    known = means[means.isfinite()]
    most = float(known.abs().max()) if known.numel() and bool(known.any()) else 1.0
    # Colour-blind readers can distinguish blue from red, not green from red. The ends are symmetric so that 0 is white.
    drawn = axes.imshow(means.double().numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(columns), [fit(name, 16) for name in train_classes], fontsize=8)
    axes.set_yticks(range(rows), [fit(name, 16) for name in query_classes], fontsize=8)
    axes.tick_params(axis="x", rotation=0 if max(map(len, train_classes)) <= 4 else 60)
    axes.set_xlabel("class of the training example")
    axes.set_ylabel("class of the query")
    if rows * columns <= _WRITTEN:
        for row, line in enumerate(means.tolist()):
            for column, mean in enumerate(line):
                if math.isfinite(mean):
                    ink = "white" if abs(mean) > 0.6 * most else "black"
                    axes.text(column, row, f"{mean:.1g}", ha="center", va="center", fontsize=6, color=ink)
    bar = figure.colorbar(drawn, ax=axes)
    bar.set_label(fit(axis("mean score", units), 8 + 6 * max(rows, 3)))
    title = f"{method + ': ' if method else ''}influence by class"
    axes.set_title(fit(title, 24 + 5 * max(columns, 4)), fontsize=11, color=colours.text)
    return figure, axes


def _edges(low: float, high: float, width: float) -> list[float]:
    if high <= low:
        return [low - width / 2, low + width / 2]
    count = max(1, round((high - low) / width))
    return [low + (high - low) * i / count for i in range(count)] + [high]
