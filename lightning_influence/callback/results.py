"""The results of a fit by name: of this process, or what those that it started (`ddp_spawn`) have left in files."""

import contextlib
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_influence.capture.places import local_path
from lightning_influence.hints import Hinted
from lightning_influence.methods.plain_loss import LABELS
from lightning_influence.scores import Scores, SelfScores, words
from lightning_influence.trajectory.files import read_manifest, runs_in
from lightning_influence.types import MissingEvidence


class NoScores(KeyError):
    """There are no scores of this name. Unlike that of other KeyErrors, the message is shown as it is."""

    def __str__(self) -> str:
        return str(self.args[0])


class Results(dict[str, Any], Hinted):
    """Scores by method name. A missing key raises with the names that exist and why the method did not run.

    ``partial`` has, by method name, the scores that were finished when an error ended a method.
    """

    def __init__(self, itself: "Results | None" = None) -> None:
        super().__init__()
        self._itself = itself  # the `self_scores` beside these scores
        self._new = True  # no fit has begun
        self.partial: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}
        self.why: str | None = None  # there are no scores at all, as the fit was not recorded

    def __repr__(self) -> str:
        rows = [[name, f"{scores.contents}, {words.unit(scores.units)}"] for name, scores in self.items()]
        rows += [
            [name, f"did not run: {why}".splitlines()[0]] for name, why in self.reasons.items() if name not in self
        ]
        return words.table(("name", "scores"), rows) if rows else f"No scores{f': {self.why}' if self.why else ' yet'}."

    def __missing__(self, key: str) -> Any:
        names, reason = ", ".join(map(repr, self)) or "none yet", self.reasons.get(key, self.why)
        why = f" {key!r} did not run: {reason}" if reason is not None else self._hint(key)
        why += f" What was finished is in `.partial[{key!r}]`." if key in self.partial else ""
        raise NoScores(f"Expected the name of existing scores ({names}), got {key!r}.{why}")

    def _hint(self, key: str) -> str:
        if self._new and not self:
            return " No fit has run yet. Call `trainer.fit` with this callback."
        if self._itself is not None and key in self._itself:
            return f" It is in `influence.self_scores[{key!r}]`."
        if key == LABELS:
            return " Pass `Influence(labels=True)`, or ask `influence.attributor.losses(checkpoints='all')`."
        known = {name.lower(): name for name in (*self, *self.reasons)}
        close = [known[name] for name in difflib.get_close_matches(str(key).lower(), known, n=1)]
        return f" Did you mean {close[0]!r}?" if close else ""

    def clear(self) -> None:
        """Remove scores and reasons."""
        super().clear()
        self._new = False
        self.partial.clear()
        self.reasons.clear()
        self.why = None

    def read(self, run_dir: Path, kind: type[Scores] | type[SelfScores], names: Iterable[str]) -> None:
        """Replace the results by those that the processes of a fit have saved, and say why there are no others."""
        self.clear()
        self.why = "the processes of the fit, which have ended, left no file of it; they have told why."
        for name in names:
            if (path := scores_file(run_dir, f"{name}{'.self' * (kind is SelfScores)}")).exists():
                self[name] = kind.load(path)


def scores_file(run_dir: Path, name: str) -> Path:
    """Where the scores of a name are saved when the fit ends."""
    return run_dir / "scores" / (re.sub(r"[^\w.-]", "_", name) + ".arrow")


def run_of(dirpath: str | None, token: str) -> Path | None:
    """The newest run that a callback with this token has recorded; None if there is none."""
    folder = None if dirpath is None else local_path(dirpath)
    for run in () if folder is None else reversed(runs_in(Path(folder).expanduser())):
        with contextlib.suppress(MissingEvidence):
            if read_manifest(run).get("callback") == token:
                return run
    return None
