"""The block of lines that `Influence` prints when it has scored a fit."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightning_influence.scores import Scores, SelfScores
from lightning_influence.scores.words import news
from lightning_influence.wording import counted

Row = tuple[str, str, str, str]

_WORTH_TELLING = 2.0  # seconds, of what was not computing scores


@dataclass
class Summary:
    """What was asked, what it cost, where it is, and what to look at first.

    Args:
        run_dir: folder of the fit; scores are saved in `scores/` inside it.
        began: when training ended, by ``time.perf_counter``.
        fit_seconds: duration of the fit.
        loggers: names of the loggers that the scores were written to.
        saved: whether they were saved.
        told: category and text of the warnings so far.
        spent: seconds by what they were spent on.
    """

    run_dir: Path
    began: float
    fit_seconds: float = 0.0
    loggers: tuple[str, ...] = ()
    saved: bool = False
    told: set[tuple[type, str]] = field(default_factory=set)
    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _rows: list[Row] = field(default_factory=list)
    _notes: dict[str, list[str]] = field(default_factory=dict)
    _missing: dict[str, None] = field(default_factory=dict)
    _seconds: float = 0.0
    _train: int = 0
    _first: str | None = None

    @contextlib.contextmanager
    def spending(self, on: str) -> Iterator[None]:
        """Counts the time of what is done inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[on] += time.perf_counter() - began

    def _times(self) -> str:
        """What the time since training ended was spent on, if more than the scores took long; otherwise empty."""
        total = time.perf_counter() - self.began
        if total - self.spent["scores"] < _WORTH_TELLING:
            return ""
        parts = {on: seconds for on, seconds in self.spent.items() if seconds >= 0.5}
        parts["other"] = total - sum(parts.values())
        shown = (f"{on} {seconds:.0f} s" for on, seconds in parts.items() if seconds >= 0.5)
        return f"{total:.0f} s since training ended: {', '.join(shown)}"

    def add(self, name: str, scores: Scores | SelfScores, estimated: float, taken: float) -> None:
        """A method's scores, and its estimated and real duration in seconds."""
        itself = isinstance(scores, SelfScores)
        where = f"influence.{'self_' * itself}scores[{name!r}]"
        asked = "each example on itself"
        if isinstance(scores, Scores):
            asked = counted(len(scores.query_ids), "query")
        elif scores.quantity != "self-influence":
            asked = f"{scores.title} of each example"
        notes = news(scores.notes)
        more = f", with {counted(len(notes), 'note')}: print({where}.notes)" if len(notes) > 1 else ""
        if len(notes) == 1:
            self._notes.setdefault(notes[0], []).append(where)
        self._rows.append((name, asked, f"{taken:.1f} s (estimated: {estimated:.1f} s)", where + more))
        self._seconds += taken
        self._train = len(scores.train_ids)
        if self._first is None or (itself and ".top(" not in self._first):
            self._first = f"{where}.top(20)" if itself else f"{where}.proponents(k=5)"

    def lacks(self, name: str) -> None:
        """What a warning has told about, in words."""
        self._missing[name] = None

    def __str__(self) -> str:
        if not self._rows:
            return ""
        widths = [max(map(len, column)) for column in zip(*self._rows, strict=True)]
        rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in self._rows]
        share = self._seconds / max(self.fit_seconds, 1e-9)
        return "\n  ".join(
            [
                f"Influence of {counted(self._train, 'training example')}, computed in {self._seconds:.1f} s "
                f"({share:.2g} times the fit's {self.fit_seconds:.1f} s):",
                *rows,
                *([times] if (times := self._times()) else []),
                *(f"note on {', '.join(of)}: {note}" for note, of in self._notes.items()),
                *([f"without {', '.join(self._missing)}: a warning says why"] if self._missing else []),
                *([f"saved in {str(self.run_dir / 'scores')!r}"] if self.saved else []),
                *([f"logged by {', '.join(self.loggers)}"] if self.loggers else []),
                f"look first at: print({self._first})",
            ]
        )
