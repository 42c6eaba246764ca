"""One example drawn into its axes, under its name, score, class and prediction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_influence.plotting.example_view import Look, ViewOptions, fitting, plain
from lightning_influence.plotting.style import blank, fit, width_of, wrap

Render: TypeAlias = Callable[..., Any]
"""Called with an example, returns what to show of it; or called with (axes, example), draws it."""

_NAME = 20  # characters of an id or a label that fit above a picture
_TEXT = {"va": "top", "ha": "left", "fontsize": 7}


class Item(NamedTuple):
    """One example to draw: its name, its score (None for a query), the example itself and what the model thinks of it.

    That is its prediction and, where they are known, the probability of the predicted class and the loss.
    """

    name: str
    score: float | None = None
    example: Any = None
    prediction: Any = None
    probability: float | None = None
    loss: float | None = None

    def opinion(self, view: ViewOptions) -> list[str]:
        """What the model thinks, in at most two lines."""
        predicted = plain(self.prediction)
        numbers = [] if self.probability is None else [f"at {self.probability:.0%}"]
        numbers += [] if self.loss is None else [f"loss {self.loss:.3g}"]
        lines = [] if predicted is None else [f"predicted {view.class_of(predicted)}"]
        return [*lines, ", ".join(numbers)] if numbers else lines


@dataclass(frozen=True)
class Drawing(ViewOptions):
    """How examples are drawn; ``targets``: their labels are numbers to predict, not classes."""

    targets: bool = False

    def draw(self, axes: Any, item: Item, colour: str, size: tuple[int, int] = (24, 11), signed: bool = True) -> None:
        """Draw one example.

        Args:
            axes: Of the figure.
            item: The example.
            colour: Of what is written above it.
            size: How many characters and lines of text fit into `axes`.
            signed: Whether a positive score has a sign.

        Raises:
            ValueError: The example holds nothing that can be drawn, and there is no `render`.
        """
        look = self.look(item.example)
        wide = max(_NAME, size[0] - 4)
        lines = [fit(item.name if item.score is not None else f"query {item.name}", wide)]
        if item.score is not None:
            lines.append(f"{item.score:+.3g}" if signed else f"{item.score:.3g}")
        if look.label is not None:
            name = self.name_of(look.label)
            number = self.targets or (isinstance(look.label, float) and not look.label.is_integer())
            lines.append(fit(f"target {self.class_of(look.label)}" if number else name, wide))
        lines += [fit(line, wide) for line in item.opinion(self)]
        axes.set_title("\n".join(lines), fontsize=8, color=colour)
        axes.set_xticks([])
        axes.set_yticks([])
        if item.example is None:
            axes.axis("off")
        elif self.draws and self.render is not None:
            self.render(axes, item.example)
        else:
            _show(axes, look, size)


def picture(render: Render, example: Any) -> Tensor:
    """[height, width, 4] bytes: what a `render` with (axes, example) draws, for where there is no figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, _ = blank(1.6, 1.6, "let `render` take an example and return what to show of it")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    render(axes, example)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).reshape(height, width, 4)


def _show(axes: Any, look: Look, size: tuple[int, int]) -> None:
    if look.kind == "image":
        axes.imshow(look.value.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    elif look.kind == "curve":
        axes.plot(look.value.numpy(), linewidth=0.8)
        axes.margins(x=0.02, y=0.1)
    elif look.kind == "row" and any(name for name, _ in look.value):
        _table(axes, look.value, *size)
    else:
        text = look.value if look.kind == "text" else "  ".join(text for _, text in look.value)
        # Clipped, since some letters are wider than the average that `size` was measured with.
        axes.text(0.04, 0.97, wrap(text, *size), clip_on=True, transform=axes.transAxes, **_TEXT)


def _table(axes: Any, cells: Sequence[tuple[str, str]], width: int, height: int) -> None:
    """Names at the left, values at the right, one pair per line."""
    if len(cells) > height:
        shown, left = fitting(cells, height - 1)
        cells = [*shown, (f"and {left} more", "")]
    for line, (name, value) in enumerate(cells):
        # The longer of the two gets the width that the shorter one leaves.
        for_value = min(width_of(value), max(width - width_of(name) - 1, width / 2 - 1))
        place = {"clip_on": True, "transform": axes.transAxes, **_TEXT}
        at = 0.97 - line * 0.94 / height
        axes.text(0.04, at, fit(name, width - for_value - 1), **place)
        axes.text(0.96, at, fit(value, for_value) if value else "", **{**place, "ha": "right"})
