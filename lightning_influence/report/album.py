"""What examples look like, small enough for a file: texts, thumbnails, rows and curves by id, up to a size limit."""

import base64
import contextlib
import json
import re
import struct
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lightning_influence.plotting.cell import picture
from lightning_influence.plotting.example_view import Look, ViewOptions, fitting, look_at, plain
from lightning_influence.plotting.image import ColourWarning

_SIDE = 96  # pixels of a thumbnail's longer side
_TEXT = 1500  # characters of a text
_CURVE = 120  # points of a curve
_CELLS = 40  # cells of a row
_OPINION = 80  # characters of an opinion


class Opinion(NamedTuple):
    """What a model thinks of an example: its loss, the predicted class or number, and of a class how probable it is."""

    loss: float | None
    prediction: float | str | None = None
    probability: float | None = None
    right: bool | None = None


Opinions: TypeAlias = Callable[[str, Sequence[int]], Mapping[int, Opinion]]
"""Called with "train" or "queries" and ids."""


@dataclass(frozen=True)
class Showing(ViewOptions):
    """How an example is turned into what the page shows.

    `predictions` are what was predicted for the queries, indexed by their ids; `opinions` are the model's, of any
    examples.
    """

    predictions: Any = None
    opinions: Opinions | None = None

    def entry(self, example: Any) -> dict[str, Any]:
        """What the page shows of one example, JSON-able: its kind, content and class.

        Raises:
            ValueError: The example holds nothing that can be shown.
        """
        look = self.look(example)
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

    def judged(self, side: str, entries: Mapping[int, dict[str, Any]]) -> None:
        """Add the model's opinions to entries, which keep a prediction that was given."""
        found = {} if self.opinions is None else self.opinions(side, list(entries))
        for i, opinion in found.items():
            words: dict[str, float | str] = {
                name: float(f"{v:.4g}") for name in ("probability", "loss") if (v := getattr(opinion, name)) is not None
            }
            if opinion.prediction is not None:
                words["prediction"] = self.class_of(opinion.prediction)
            if opinion.right is not None:
                words["right"] = opinion.right
            if "prediction" in entries[i]:
                words = {name: words[name] for name in ("loss",) if name in words}
            entries[i].update(words)

    def words(self, example: Any, most: int) -> dict[str, str]:
        """The class of an example and a line about it, where it is a text or a row; empty if it cannot be shown."""
        try:
            look = super().look(example)  # words, for which nothing is drawn
        except ValueError:
            return {}
        made = {} if look.label is None else {"class": self.class_of(look.label)}
        text = look.value if look.kind == "text" else ""
        if look.kind == "row":
            text = ", ".join(f"{name} {value}".strip() for name, value in look.value)
        if text:
            made["example"] = textwrap.shorten(text, most, placeholder="…")
        return made

    def look(self, example: Any) -> Look:
        """What to show of an example; a picture of what a `render` with (axes, example) draws.

        Raises:
            ValueError: The example holds nothing that can be shown.
        """
        look = super().look(example)
        if not self.draws or self.render is None:
            return look
        return look_at(picture(self.render, example))._replace(label=look.label)


@dataclass
class Album:
    """What is shown of training examples and queries, by id; ``kept`` says that it is of a file of scores.

    `view` is how they were shown, of which a file keeps the names of classes and columns; `doubts` are what was said
    meanwhile, as about colours.
    """

    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    queries: dict[int, dict[str, Any]] = field(default_factory=dict)
    kept: bool = False
    view: ViewOptions = field(default_factory=ViewOptions, compare=False)
    doubts: Sequence[str] = ()

    def with_train(self, other: "Album | None") -> "Album":
        """This one with the training examples of another, too."""
        return replace(self, train=(other.train if other else {}) | self.train)

    def to_json(self) -> str:
        """The album as JSON, which `from_json` reads."""
        sides = [list(side.items()) for side in (self.train, self.queries)]
        labels, columns, named_classes = self.view.labels, self.view.columns, None
        if labels is not None:
            pairs = labels.items() if isinstance(labels, Mapping) else enumerate(labels)
            named_classes = [(int(number), str(name)) for number, name in pairs]
        names = [named_classes, None if columns is None else [str(name) for name in columns]]
        named = [[*names, list(self.doubts)]] if any((*names, self.doubts)) else []
        return json.dumps([*sides, *named], ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Album":
        """The album that `to_json` wrote."""
        train, queries, *named = json.loads(text)  # files of earlier versions have no names
        labels, columns, doubts = named[0] if named else (None, None, [])
        view = ViewOptions(labels=None if labels is None else dict(labels), columns=columns)
        return cls(dict(train), dict(queries), view=view, doubts=doubts)

    def looks(self, side: str) -> "KeptLooks | None":
        """What the examples of the ``"train"`` or ``"queries"`` side look like, for figures; None without any."""
        entries = self.train if side == "train" else self.queries
        return KeptLooks(entries) if entries else None

    def opinions(self, side: str, ids: Sequence[int]) -> dict[int, Opinion]:
        """What the model thought of examples."""
        entries = self.train if side == "train" else self.queries
        known = {i: entries[i] for i in ids if i in entries}
        words = Opinion._fields
        found = {i: {word: entry[word] for word in words if word in entry} for i, entry in known.items()}
        return {i: Opinion(**{"loss": None, **told}) for i, told in found.items() if told}

    def __getstate__(self) -> dict[str, Any]:
        # A function need not survive pickling.
        return self.__dict__ | {"view": replace(self.view, render=None)}


class KeptLooks:
    """The examples of an album by id, as figures draw them; None for others."""

    def __init__(self, entries: Mapping[int, Mapping[str, Any]]) -> None:
        self._entries = entries

    def __getitem__(self, example: int) -> Look | None:
        entry = self._entries.get(example)
        if entry is None or entry["kind"] == "nothing":
            return None
        kind, value = entry["kind"], entry["value"]
        if kind == "image":
            value = image_of_png(base64.b64decode(value))
        elif kind == "row":
            value = [(name, text) for name, text in value]
        elif kind == "curve":
            value = torch.tensor(value)
        return Look(kind, value, entry.get("class"))


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
    showing = showing.suited_to(train, queries)
    album, budget = Album(view=ViewOptions(*(getattr(showing, f.name) for f in fields(ViewOptions)))), megabytes * 1e6
    sides = (queries, query_order, album.queries, 1 / 3), (train, train_order, album.train, 1.0)
    with _said_once() as album.doubts:
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
                size = len(json.dumps(made)) + 12 + _OPINION * (showing.opinions is not None)
                left, budget = left - size, budget - size
    showing.judged("train", album.train if train is not None else {})
    showing.judged("queries", album.queries)
    return album


@contextlib.contextmanager
def _said_once() -> Iterator[list[str]]:
    """The distinct warnings about colours in the block; all are given once at its end."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    for one in {re.sub(r"from -?\d\S* to -?\d\S*", "", str(one.message)): one for one in reversed(caught)}.values():
        if issubclass(one.category, ColourWarning):
            told.append(str(one.message))
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


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


def image_of_png(file: bytes) -> Tensor:
    """The image in a file that `png` wrote, as it was given there.

    Raises:
        ValueError: It is larger than an album's, and somebody else's: it must not fill the memory.
    """
    width, height, _, kind = struct.unpack(">IIBB", file[16:26])
    if max(width, height) > _SIDE:
        raise ValueError(f"Expected an image of at most {_SIDE} pixels a side, got {width} x {height}.")
    start = file.index(b"IDAT")
    size = struct.unpack(">I", file[start - 4 : start])[0]
    most = height * (1 + width * 3)
    content = zlib.decompressobj().decompress(file[start + 4 : start + 4 + size], most)
    lines = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels = lines.reshape(height, -1)[:, 1:].double() / 255
    return pixels.reshape(height, width, 3) if kind == 2 else pixels


def _small(look: Look) -> Any:
    if look.kind == "image":
        return base64.b64encode(png(_thumbnail(look.value))).decode()
    if look.kind == "text":
        return look.value if len(look.value) <= _TEXT else look.value[: _TEXT - 1] + "…"
    if look.kind == "row":
        shown, left = fitting(look.value, _CELLS)
        cells = [[name[:80], text[:200]] for name, text in shown]
        return [*cells, ["", f"and {left} more"]] if left else cells
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
