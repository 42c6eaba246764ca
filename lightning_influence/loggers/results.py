"""What is written into a tracker, in forms that every tracker can show in some way."""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_influence.loggers.summary import Histogram, Table


@dataclass(frozen=True)
class TrackerResults:
    """One method's results for a tracker.

    Args:
        name: Name of the method; everything is logged under `influence/<name>/`.
        step: The x-axis.
        scalars: Name to number.
        tables: Name to table.
        figures: Name to `matplotlib.figure.Figure`.
        histograms: Name to counts.
        texts: Name to text, such as what a reader must know about the numbers.
    """

    name: str
    step: int | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        """The prefix of every name."""
        return f"influence/{self.name}"

    @property
    def file_head(self) -> str:
        """The prefix as the name of a folder."""
        return f"influence/{file_name(self.name)}"


def file_name(name: str) -> str:
    """The name with only characters that every file system accepts."""
    return re.sub(r"[^\w.-]+", "_", name)


def as_csv(table: Table) -> str:
    """The table as a CSV file."""
    columns, rows = table
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    return text.getvalue()


def as_png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
