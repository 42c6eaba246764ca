"""The page: all its data as JSON in one HTML file, which asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_influence.files.atomic import whole
from lightning_influence.report.album import Album
from lightning_influence.report.decisions import DECISIONS


@dataclass(frozen=True)
class Page:
    """What stands on it.

    Args:
        title: Of the page.
        facts: What a reader must know, a sentence or two each.
        units: Of the scores.
        train_ids: [train] int64, ascending.
        train_base: [train] ids under a `Subset`, where they differ.
        columns: Title to [train] scores of the training examples; the first one is what they are sorted by.
        query_ids: [query] int64, or None where there are no queries.
        query_base: [query] ids under a `Subset`, where they differ.
        pairs: Of each query the [query, pair] places in `train_ids` and the scores of what it is explained by; a place
            of -1 is none.
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

    def data(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        album = self.album or Album()
        place = {train_id: at for at, train_id in enumerate(self.train_ids.tolist())}
        made: dict[str, Any] = {
            "decisions": DECISIONS,
            "units": self.units,
            "train": {
                "id": self.train_ids.tolist(),
                "base": None if self.train_base is None else self.train_base.tolist(),
                "columns": [{"title": title, "scores": _short(scores)} for title, scores in self.columns.items()],
                "looks": {str(place[i]): look for i, look in album.train.items() if i in place},
            },
            "queries": None,
        }
        if self.query_ids is not None and self.pairs is not None:
            rows = {query: at for at, query in enumerate(self.query_ids.tolist())}
            pairs = [
                [[at, score] for at, score in zip(places, scores, strict=True) if at >= 0]
                for places, scores in zip(self.pairs[0].tolist(), map(_short, self.pairs[1]), strict=True)
            ]
            made["queries"] = {
                "id": self.query_ids.tolist(),
                "base": None if self.query_base is None else self.query_base.tolist(),
                "pairs": pairs,
                "looks": {str(rows[i]): look for i, look in album.queries.items() if i in rows},
            }
        return made


def write_page(path: str | os.PathLike[str], page: Page) -> Path:
    """Write it as one HTML file, in place of what was there.

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
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(
            'The page needs Jinja2. Run `pip install "lightning-influence[report]"`, or read the scores by `to_arrow` '
            "instead."
        ) from error
    template, style, script = ((files(__package__) / f"page.{end}").read_text("utf-8") for end in ("html", "css", "js"))
    data = page.data()
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Inside a script element only these can end it or begin a comment; JSON reads them back from their escapes.
    for sign in "<>&\u2028\u2029":
        encoded = encoded.replace(sign, f"\\u{ord(sign):04x}")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        title=page.title,
        facts=page.facts,
        shown=len(data["train"]["looks"]),
        count=page.train_ids.numel(),
        has_queries=data["queries"] is not None,
        style=Markup(style),
        script=Markup(script),
        # The browser runs this script and no other, whatever the data hold.
        allowed=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(encoded),
        digest=hashlib.sha256(encoded.encode()).hexdigest()[:16],
    )


def _short(scores: Tensor) -> list[float | None]:
    """Nine digits rank as float32 does; a NaN is no number in JSON."""
    return [float(f"{score:.9g}") if abs(score) < float("inf") else None for score in scores.tolist()]
