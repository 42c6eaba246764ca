"""What `Scores` and `SelfScores` share: the record beside the numbers, in words and in the head of a file."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
from torch import Tensor

from lightning_influence.checks import optional
from lightning_influence.files import arrow
from lightning_influence.hints import Hinted
from lightning_influence.plotting.example_view import ViewOptions, printable
from lightning_influence.report import Album, Opinions
from lightning_influence.scores import words
from lightning_influence.scores.id_checks import ascending, base_of
from lightning_influence.wording import counted

_Options = TypeVar("_Options", bound=ViewOptions)

MATRIX = "scores"
"""The column of `Scores` files that may be larger than the memory."""


class Answer(Hinted):
    """The record that scores of either kind carry beside their numbers.

    Args:
        train_ids: [train] int64, ascending.
        train_base: [train] int64, the ids in the dataset under a `Subset`; None where they are the same.
        method: Name of the method.
        settings: Its hyper-parameters, JSON-able.
        units: What one unit of a score is, in words.
        notes: What a reader must know to trust the numbers.
        checkpoints: Steps of the checkpoints that were used.
        diagnostics: Numbers by name that show how far to trust the scores, such as a solver's residual.

    Raises:
        TypeError: `settings` that JSON cannot hold, ids that are not int64, or `diagnostics` that are not numbers.
        ValueError: Ids that are not ascending, or base ids of another number.
    """

    def __init__(
        self,
        train_ids: Tensor,
        train_base: Tensor | None,
        method: str,
        settings: Mapping[str, Any] | None,
        units: str,
        notes: Sequence[str],
        checkpoints: Sequence[int],
        diagnostics: Mapping[str, float] | None,
    ) -> None:
        try:
            self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings or {})))
        except TypeError as error:
            raise TypeError(
                f"Expected `settings` to hold what JSON can (numbers, strings, lists, dicts), got {settings!r}."
            ) from error
        self.method, self.units = printable(method), printable(units)  # they may come from somebody's file
        self.notes = tuple(printable(note) for note in notes)
        self.checkpoints = tuple(int(step) for step in checkpoints)
        self.train_ids = ascending("train_ids", train_ids)
        self._train_base = base_of("train_ids", train_base, self.train_ids)
        self.diagnostics = numbers("diagnostics", diagnostics)

        self._ids = {"train": (self.train_ids, self._train_base)}
        """The ids of each side that has any, and those under a `Subset` where they differ."""

        self.at_hand: tuple[Any, Any] = (None, None)
        """The training dataset and the queries', for pictures; only in the process that computed the scores."""

        self.opinions: Opinions | None = None
        """The model's predictions and losses, likewise."""

        self.album: Album | None = None
        """What the examples look like, where `save` kept it."""

    def viewed(self, options: _Options) -> _Options:
        """Options of how examples are shown; those that are None are as for the album, if there is one."""
        return options if self.album is None else options.filled(self.album.view)

    @property
    def meaning(self) -> str:
        """What a high and a low score say."""
        return (
            "Positive is a proponent (having the example in the training set makes the query better), negative an "
            "opponent."
        )

    @property
    def contents(self) -> str:
        """What the numbers are, and how many."""
        raise NotImplementedError

    @property
    def figures(self) -> dict[str, float]:
        """`diagnostics` under their former name."""
        return self.diagnostics

    def to_arrow(self, k: int | None = None) -> pa.Table:
        """The scores as a table."""
        raise NotImplementedError

    def to_pandas(self, k: int | None = None) -> Any:
        """The table of `to_arrow` as a `pandas.DataFrame`.

        Raises:
            ValueError: `k` is below 1, or more than `to_arrow` accepts.
            ImportError: pandas is not installed.
        """
        with optional("pandas", "pandas", "`to_pandas`", "use `to_arrow`"):
            import pandas  # noqa: F401
        return self.to_arrow(k).to_pandas()

    def __getstate__(self) -> dict[str, Any]:
        # Datasets may be large, or bound to open files: neither travels with the scores.
        return self.__dict__ | {"at_hand": (None, None), "opinions": None}


def numbers(name: str, given: Mapping[str, float] | None) -> dict[str, float]:
    """Numbers by name as plain floats.

    Raises:
        TypeError: Something is not a single number.
    """
    try:
        return {str(key): float(value) for key, value in (given or {}).items()}
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TypeError(f"Expected `{name}` to map names to single numbers, got {given!r}.") from error


def paragraph(answer: Answer, findings: Sequence[str]) -> str:
    """What the scores are and what was found, then what a reader must know about them, a line for each note."""
    head = f"{answer.method}: {answer.contents}, {words.unit(answer.units)}."
    text = " ".join([head, answer.meaning, *_evidence(answer), *findings])
    lines = [text, *(f"Note: {note.rstrip('.')}." for note in words.to_print(answer.notes))]
    # A line that is broken goes on further to the right.
    filled = (
        textwrap.fill(line, 100, subsequent_indent="  " * (line is not text), break_on_hyphens=False) for line in lines
    )
    return "\n".join(filled)


def facts(answer: Answer) -> list[str]:
    """What a reader of the page must know, one or two sentences each."""
    settings = printable(", ".join(f"{name} = {value}" for name, value in words.settings(answer.settings).items()))
    return [
        f"{answer.method}: {answer.contents}, {words.unit(answer.units)}.",
        answer.meaning,
        *([f"Settings: {settings}."] if settings else []),
        *_evidence(answer),
        *(f"{note.rstrip('.')}." for note in answer.notes),
    ]


def file_head(answer: Answer) -> dict[str, Any]:
    """The record as the head of a file, where the diagnostics are called figures."""
    head = {name: getattr(answer, name) for name in ("method", "settings", "units", "notes", "checkpoints", "figures")}
    return head if answer.album is None else head | {"album": answer.album.to_json()}


def read_file(path: arrow.FilePath, kinds: Sequence[str]) -> tuple[arrow.ArrowFile, dict[str, Any], Album | None]:
    """A mapped file, its head with the diagnostics under their own name, and the album.

    All columns are verified, except the scores of a matrix.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or of another kind.
    """
    found = arrow.map_batches(path, kinds)
    found.check(*(t for batch in found.batches for name, t in batch.items() if name != MATRIX))
    head = dict(found.metadata)
    album = head.pop("album", None)
    head["diagnostics"] = head.pop("figures", None)
    return found, head, None if album is None else Album.from_json(album)


def _evidence(answer: Answer) -> list[str]:
    sentences = []
    if answer.checkpoints:
        first, last, count = min(answer.checkpoints), max(answer.checkpoints), len(answer.checkpoints)
        steps = f"step {first}" if count == 1 else f"steps {first} to {last}"
        sentences.append(f"{counted(count, 'checkpoint')} ({steps}).")
    if words.diagnostics(answer.diagnostics):
        sentences.append(f"{words.diagnostics(answer.diagnostics)}.")
    return sentences
