"""What examples look like, small enough for a file: texts, thumbnails, rows and curves by id, up to a size limit."""

import base64
import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lightning_influence.plotting.example_view import Look, ViewOptions, look_at, plain

_SIDE = 96  # pixels of a thumbnail's longer side
_TEXT = 1500  # characters of a text
_CURVE = 120  # points of a curve
_CELLS = 40  # cells of a row


@dataclass(frozen=True)
class Showing(ViewOptions):
    """How an example is turned into what the page shows.

    `render` returns what to show in its place: a text, an image, a vector or a dict of them. `predictions` are what was
    predicted for the queries, indexed by their ids.
    """

    predictions: Any = None

    def entry(self, example: Any) -> dict[str, Any]:
        """What the page shows of one example, JSON-able: its kind, content and class.

        Raises:
            ValueError: The example holds nothing that can be shown.
        """
        look = self._look(example)
        made: dict[str, Any] = {"kind": look.kind, "value": _small(look)}
        if look.label is not None:
            made["class"] = self.class_of(look.label)
        return made

    def prediction(self, query: int) -> dict[str, str]:
        """The predicted class of a query, where it is known."""
        try:
            found = None if self.predictions is None else plain(self.predictions[query])
        except (KeyError, IndexError):
            found = None
        return {} if found is None else {"prediction": self.class_of(found)}

    def _look(self, example: Any) -> Look:
        if self.render is None:
            return look_at(example, self.columns, self.normalization)
        look = look_at(self.render(example), self.columns, self.normalization)
        if look.label is not None:
            return look
        try:
            return look._replace(label=look_at(example, self.columns).label)
        except ValueError:
            return look


@dataclass
class Album:
    """What is shown of training examples and queries, by id."""

    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    queries: dict[int, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The album as JSON, which `from_json` reads."""
        sides = (list(side.items()) for side in (self.train, self.queries))
        return json.dumps(list(sides), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Album":
        """The album that `to_json` wrote."""
        train, queries = (dict(map(tuple, side)) for side in json.loads(text))
        return cls(train, queries)


def collect(
    train: Any, queries: Any, train_order: Iterable[int], query_order: Iterable[int], showing: Showing, megabytes: float
) -> Album:
    """Fill an album up to its size: first with queries, up to a third of it, then with training examples.

    Args:
        train: The training `Dataset`, or None.
        queries: The queries' `Dataset`, or None.
        train_order: Ids of training examples, the most important first; may repeat.
        query_order: Ids of queries, the most important first.
        showing: How examples are shown.
        megabytes: The size of the album as JSON.

    Raises:
        ValueError: An example cannot be shown, and there is no `render`.
    """
    showing = showing.normalized_as(queries if train is None else train)
    album, budget = Album(), megabytes * 1e6
    sides = (queries, query_order, album.queries, 1 / 3), (train, train_order, album.train, 1.0)
    for dataset, order, into, share in sides:
        left = budget * share
        for i in order:
            if left <= 0:
                break
            if i in into:
                continue
            # Predictions are known even without the data.
            made = {"kind": "nothing", "value": None} if dataset is None else showing.entry(dataset[i])
            if into is album.queries:
                made |= showing.prediction(i)
            if dataset is None and len(made) == 2:
                break
            into[i] = made
            # The id and the separators take about 12 characters more.
            size = len(json.dumps(made)) + 12
            left, budget = left - size, budget - size
    return album


def png(image: Tensor) -> bytes:
    """The PNG file of a [height, width] or [height, width, 3] image between 0 and 1."""
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8)
    height, width = pixels.shape[:2]
    # Each row of a PNG starts with the number of its filter; 0 is none.
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.reshape(height, -1)], dim=1)

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    body = zlib.compress(lines.numpy().tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", body) + part(b"IEND", b"")


def _small(look: Look) -> Any:
    if look.kind == "image":
        return base64.b64encode(png(_thumbnail(look.value))).decode()
    if look.kind == "text":
        return look.value if len(look.value) <= _TEXT else look.value[: _TEXT - 1] + "…"
    if look.kind == "row":
        cells = [[name[:80], text[:200]] for name, text in look.value[:_CELLS]]
        left = len(look.value) - _CELLS
        return cells if left <= 0 else [*cells, ["", f"and {left} more"]]
    if look.kind == "curve":
        values = look.value.nan_to_num(0.0, 0.0, 0.0)
        if values.numel() > _CURVE:
            values = values[torch.linspace(0, values.numel() - 1, _CURVE).round().long()]
        return [float(f"{value:.4g}") for value in values.tolist()]
    return None


def _thumbnail(image: Tensor) -> Tensor:
    height, width = image.shape[:2]
    scale = _SIDE / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    planes = image[None] if image.ndim == 2 else image.movedim(2, 0)
    small = adaptive_avg_pool2d(planes, size)
    return small[0] if image.ndim == 2 else small.movedim(0, 2)
