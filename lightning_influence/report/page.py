"""The page: one HTML file that holds all its data as JSON and needs no network."""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_influence.checks import optional
from lightning_influence.files.atomic import whole
from lightning_influence.report.album import Album
from lightning_influence.report.decisions import DECISIONS
from lightning_influence.report.snippet import unbroken

_MORE = "A larger `megabytes` for `report` makes room for more."
_MORE_KEPT = (
    "More are kept with the scores by `Influence(album={'megabytes': 20})`, or by `scores.save(path, megabytes=20)`."
)


@dataclass(frozen=True)
class Page:
    """The content of the page.

    Args:
        title: Of the page.
        facts: What a reader must know, a sentence or two each.
        units: Of the scores.
        train_ids: [train] int64, ascending.
        train_base: [train] ids under a `Subset`, where they differ.
        columns: Title to [train] scores of the training examples, which are sorted by the first column.
        meanings: What a column says, by its title.
        query_ids: [query] int64, or None where there are no queries.
        query_base: [query] ids under a `Subset`, where they differ.
        pairs: [query, pair] positions in `train_ids` and scores of the training examples that explain each query; a
            position of -1 is empty.
        album: What the examples look like.
    """

    title: str
    facts: Sequence[str]
    units: str
    train_ids: Tensor
    train_base: Tensor | None
    columns: dict[str, Tensor]
    query_ids: Tensor | None = None
    query_base: Tensor | None = None
    pairs: tuple[Tensor, Tensor] | None = None
    album: Album | None = None
    meanings: Mapping[str, str] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """The content in types that JSON can hold."""
        album = self.album or Album()
        columns = [
            {"title": title, "scores": _short(scores), "meaning": self.meanings.get(title, "")}
            for title, scores in self.columns.items()
        ]
        train = _side(self.train_ids, self.train_base, {"columns": columns}, album.train)
        queries = None
        if self.query_ids is not None and self.pairs is not None:
            pairs = [
                [[at, score] for at, score in zip(places, scores, strict=True) if at >= 0]
                for places, scores in zip(self.pairs[0].tolist(), map(_short, self.pairs[1]), strict=True)
            ]
            queries = _side(self.query_ids, self.query_base, {"pairs": pairs}, album.queries)
        return {"decisions": DECISIONS, "units": self.units, "train": train, "queries": queries}


def write_page(path: str | os.PathLike[str], page: Page) -> Path:
    """Write the page as one HTML file, replacing an existing one.

    Raises:
        ImportError: Jinja2 is not installed.
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"Expected `path` to name a file, got the folder {str(path)!r}. Add a file name to it.")
    text = _html(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        file.write(text.encode())
    return path


def _html(page: Page) -> str:
    with optional("Jinja2", "report", "the page", "read the scores with `to_arrow`"):
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    template, style, script = ((files(__package__) / f"page.{end}").read_text("utf-8") for end in ("html", "css", "js"))
    data = page.data()
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    encoded = encoded.encode(errors="replace").decode()  # an album that was read may hold lone surrogates
    # Only these can end a script element or start a comment in it. A JSON parser reads their escapes back.
    for sign in "<>&\u2028\u2029":
        encoded = encoded.replace(sign, f"\\u{ord(sign):04x}")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["unbroken"] = unbroken
    return environment.from_string(template).render(
        title=page.title,
        facts=page.facts,
        more=_MORE_KEPT if page.album is not None and page.album.kept else _MORE,
        shown=len(data["train"]["looks"]),
        count=page.train_ids.numel(),
        doubts=() if page.album is None else page.album.doubts,
        has_queries=data["queries"] is not None,
        style=Markup(style),
        script=Markup(script),
        # The browser runs only this script, whatever the data contain.
        allowed=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(encoded),
        digest=hashlib.sha256(encoded.encode()).hexdigest()[:16],
    )


def _side(ids: Tensor, base: Tensor | None, content: dict[str, Any], looks: dict[int, Any]) -> dict[str, Any]:
    """The training examples or the queries: their ids, what else is known about them, and what those look like."""
    place = {one: at for at, one in enumerate(ids.tolist())}
    return {
        "id": ids.tolist(),
        "base": None if base is None else base.tolist(),
        **content,
        "looks": {str(place[i]): look for i, look in looks.items() if i in place},
    }


def _short(scores: Tensor) -> list[float | None]:
    """Nine digits, which keep the order of float32; None for NaN and infinity, which JSON does not have."""
    return [float(f"{score:.9g}") if abs(score) < float("inf") else None for score in scores.tolist()]
