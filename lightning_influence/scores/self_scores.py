"""`SelfScores`: one number for each example, its self-influence or its loss, highest for what to look at first."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lightning_influence import loggers as trackers
from lightning_influence import plotting, report
from lightning_influence.checks import check_integer
from lightning_influence.files import arrow
from lightning_influence.numerics.topk import top_k
from lightning_influence.plotting.example_view import Classes, printable
from lightning_influence.plotting.normalization import Normalization
from lightning_influence.scores import figures, page, tracked
from lightning_influence.scores.base import Answer, facts, file_head, paragraph, read_file
from lightning_influence.scores.data import given_or_at_hand
from lightning_influence.scores.id_checks import name_of
from lightning_influence.scores.ranking import floating, refuse_non_finite
from lightning_influence.scores.topk import TopK
from lightning_influence.wording import counted

_LOGGED = 100  # rows of the table in a tracker


class SelfScores(Answer):
    """One number for every training example: its influence on itself, or its loss; suspect labels are highest.

    Args:
        train_ids: [train] int64, ascending: indices into the training `Dataset`.
        values: [train] float32 or float64.
        method: Name of the method.
        settings: Its hyper-parameters, JSON-able.
        units: What one unit of a score is, in words.
        notes: What a reader must know to trust the numbers.
        checkpoints: Steps of the checkpoints that were used.
        base: [train] int64, the ids in the dataset under a `Subset`; None where they are the same.
        diagnostics: Numbers by name that show how far to trust the scores, such as a solver's residual.
        quantity: What the numbers are, in words.

    Raises:
        TypeError: `values` or ids of another dtype; `settings` that JSON cannot hold; `diagnostics` not of numbers.
        ValueError: Shapes that do not fit, ids not ascending, NaN or infinite values.

    Example:
        >>> scores = SelfScores(torch.arange(3), torch.tensor([0.5, 4.0, 1.0]), "TracInCP")
        >>> scores.top(2).train_ids.tolist()
        [1, 2]
    """

    def __init__(  # noqa: PLR0913
        self,
        train_ids: Tensor,
        values: Tensor,
        method: str,
        settings: Mapping[str, Any] | None = None,
        units: str = "loss",
        notes: Sequence[str] = (),
        checkpoints: Sequence[int] = (),
        base: Tensor | None = None,
        diagnostics: Mapping[str, float] | None = None,
        *,
        quantity: str = "self-influence",
    ) -> None:
        super().__init__(train_ids, base, method, settings, units, notes, checkpoints, diagnostics)
        self.quantity = printable(quantity)
        self.values = floating(values)
        if self.values.shape != self.train_ids.shape:
            raise ValueError(
                f"Expected `values` to be {self.train_ids.numel()} scores, one per training example, "
                f"got shape {list(self.values.shape)}."
            )
        refuse_non_finite(self.values[None], self.train_ids, None)

    @property
    def meaning(self) -> str:
        """What a high score says."""
        if self.quantity == "loss":
            return "The highest are the labels (in regression: the targets) to check first."
        return "The highest are examples that the model had to memorise: wrong labels or targets, odd or rare ones."

    @property
    def title(self) -> str:
        """What the numbers are, such as "mean loss over 8 checkpoints"."""
        if self.quantity == "loss" and len(self.checkpoints) > 1:
            return f"mean loss over {counted(len(self.checkpoints), 'checkpoint')}"
        return self.quantity

    @property
    def contents(self) -> str:
        """What the numbers are, and how many."""
        return f"{self.title}, {counted(len(self), 'training example')}"

    def __len__(self) -> int:
        return self.train_ids.numel()

    def base_ids(self) -> Tensor:
        """[train] indices into the dataset under any `Subset`; `train_ids` themselves where there is none."""
        return self.train_ids if self._train_base is None else self._train_base

    def top(self, k: int = 5) -> TopK:
        """The k highest, descending; among equal ones the smaller id comes first: scores and ids, each [k].

        Raises:
            ValueError: `k` is below 1 or above the number of training examples.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"Expected `k` between 1 and {len(self)} (the number of training examples), got {k!r}.")
        scores, ids = top_k(self.values[None], self.train_ids, k)
        return TopK(scores[0], ids[0]).about(None, self.train_ids, self._train_base)

    def to_arrow(self, k: int | None = None) -> pa.Table:
        """The ranking as a table: `train_id`, `score`, `rank` and, where it differs, `train_base_id`.

        Raises:
            ValueError: `k` is below 1 or above the number of training examples.
        """
        scores, ids = self.top(len(self) if k is None else k)
        columns = {"train_id": ids, "score": scores, "rank": torch.arange(1, ids.numel() + 1)}
        if self._train_base is not None:
            columns["train_base_id"] = self._train_base[torch.searchsorted(self.train_ids, ids)]
        return pa.table({name: column.numpy() for name, column in columns.items()})

    def save(self, path: str | os.PathLike[str], overwrite: bool = False, **shown: Any) -> Path:
        """Write the scores into one Arrow file, one row per example; see `arrow.write_file` for what it raises.

        Args:
            path: The file.
            overwrite: Replace an existing file.
            shown: Arguments of `report`. With any of these the file also keeps what the highest examples look like.

        Raises:
            TypeError: Another argument in `shown`.
            ValueError: Arguments in `shown`, but no data to show.
        """
        columns = {"train_id": self.train_ids, "score": self.values}
        if self._train_base is not None:
            columns["train_base_id"] = self._train_base
        if shown:
            self.album = page.album_to_keep(self, self._orders(), shown)
        head = file_head(self) | ({} if self.quantity == "self-influence" else {"quantity": self.quantity})
        return arrow.write_file(path, "self_scores", columns, head, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SelfScores":
        """Map a saved file into memory.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or of another kind.
        """
        found, head, album = read_file(path, ("self_scores",))
        columns = found.columns()
        made = cls(columns["train_id"], columns["score"], **head, base=columns.get("train_base_id"))
        made.album = album
        return made

    def __repr__(self) -> str:
        highest = ", ".join(f"{name}: {score:.3g}" for name, score in self._highest(3))
        return paragraph(self, [f"Mean {float(self.values.mean()):.3g}, highest: {highest}."])

    def _repr_html_(self) -> str:
        highest = self._highest(10)
        looks = {} if self.album is None else self.album.train
        known = page.known_of(looks)
        about = [looks.get(i, {}) for i in self.top(len(highest)).train_ids.tolist()]
        rows = [
            [name, *(look.get(key, "") for key in known.values()), f"{score:.4g}"]
            for (name, score), look in zip(highest, about, strict=True)
        ]
        return report.snippet(repr(self), ["training example", *known, self.title], rows)

    def plot(self, flagged_fraction: float = 0.1) -> tuple[Any, Any]:
        """Draw the distribution, with the highest fraction marked.

        Returns:
            A `matplotlib.figure.Figure` and its axes; no window opens. `figure.savefig(path)` writes it.

        Raises:
            ValueError: `flagged_fraction` is not between 0 and 1.
            ImportError: matplotlib is not installed.
        """
        about = {"method": self.method, "units": self.units, "quantity": self.title}
        return plotting.self_influence(self.values, flagged_fraction, **about)

    def plot_top(
        self,
        k: int = 10,
        train: Any = None,
        render: plotting.Render | None = None,
        labels: Classes | None = None,
        *,
        columns: Sequence[str] | None = None,
        normalization: Normalization | None = None,
    ) -> tuple[Any, list[Any]]:
        """Draw the k highest training examples, with their classes and what the model predicts; see `Scores.plot`.

        Returns:
            A `matplotlib.figure.Figure` and the axes of each example.

        Raises:
            ValueError: `k` is below 1, no data are at hand and none were passed, or an example needs `render`.
            ImportError: matplotlib is not installed.
        """
        check_integer("k", k)
        drawing = plotting.Drawing(render, labels, columns, normalization)
        train = given_or_at_hand(self, train, None)[0]
        return figures.highest(self, self.title, self.top(min(k, len(self))), train, drawing)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        train: Any = None,
        render: plotting.Render | None = None,
        labels: Classes | None = None,
        columns: Sequence[str] | None = None,
        normalization: Normalization | None = None,
        megabytes: float = 15.0,
    ) -> Path:
        """Write one self-contained page on which to review the training examples; see `Scores.report`.

        Raises:
            ValueError: An example needs `render` to be shown.
            ImportError: Jinja2 is not installed.
        """
        showing = report.Showing(render, labels, columns, normalization)
        content = report.Page(
            title=f"{self.method}: {self.contents}",
            facts=facts(self),
            units=self.units,
            train_ids=self.train_ids,
            train_base=self._train_base,
            columns={self.title.capitalize(): self.values},
            meanings={self.title.capitalize(): self.meaning},
            album=page.album_of(self, self._orders(), (train, None), showing, megabytes),
        )
        return report.write_page(path, content)

    def log(self, loggers: Any, step: int | None = None, name: str | None = None, **drawing: Any) -> None:
        """Write scalars, a table of the highest scores, a histogram and a figure into Lightning's loggers.

        Args:
            loggers: `trainer.loggers`, or one logger.
            step: The x-axis; `trainer.global_step` after a fit.
            name: What follows `influence/`; the method by default.
            drawing: Arguments of `plot` and `plot_top`: `flagged_fraction`, `train`, `render`, `labels`.
        """
        if not trackers.listening(loggers):
            return
        what = self.quantity.replace("-", "_").replace(" ", "_")
        scalars, histograms = trackers.of_self_influence(self.values, what)
        table = {what: tracked.described(self, arrow.as_rows(self.to_arrow(min(_LOGGED, len(self)))), drawing)}
        fraction = drawing.pop("flagged_fraction", 0.1)
        draw = {what: lambda: self.plot(fraction)[0]}
        if given_or_at_hand(self, drawing.get("train"), None)[0] is not None:
            draw[f"{what}_highest"] = lambda: self.plot_top(**drawing)[0]
        drawn, about = trackers.drawn(**draw), {f"about_{what}": repr(self)}
        more = self.diagnostics | scalars
        results = trackers.TrackerResults(name or self.method, step, more, table, drawn, histograms, about)
        trackers.log_influence(loggers, results)

    def _highest(self, k: int) -> list[tuple[str, float]]:
        """Names and scores of the k highest, fewer where there are fewer."""
        scores, ids = (part.tolist() for part in self.top(min(k, len(self))))
        return [(name_of(i, self.train_ids, self._train_base), score) for i, score in zip(ids, scores, strict=True)]

    def _orders(self) -> tuple[list[int], list[int]]:
        """Training ids for an album, highest first, and no queries."""
        return self.top(len(self)).train_ids.tolist(), []
