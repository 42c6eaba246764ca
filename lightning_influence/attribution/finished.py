"""What an error leaves of the scores: those that were finished go with it, as ``error.scores``."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_influence.attribution.accumulators import NonFinite
from lightning_influence.gradients.reduction import NoRelation
from lightning_influence.gradients.spot_checks import UnequalWeight
from lightning_influence.methods.kinds import StageSums
from lightning_influence.processes import Processes
from lightning_influence.scores import Scores, SelfScores
from lightning_influence.wording import counted

Kept: TypeAlias = tuple[Scores | SelfScores, str]
"""Scores, and which they are."""


@dataclass
class Part:
    """Final scores of some queries by some training examples.

    Args:
        values: [query, train]; None: the strongest few of the accumulator.
        rows: positions of the queries.
        columns: positions of the training examples, among those with scores.
        steps: of the checkpoints that the scores are sums over; None: of all.
    """

    values: Tensor | None
    rows: Tensor
    columns: Tensor
    steps: Sequence[int] | None = None

    @classmethod
    def finite(cls, values: Tensor, unknown: bool = False, steps: Sequence[int] | None = None) -> "Part | None":
        """The part of [query, train] values that is finite, or with ``unknown`` all of it; None if nothing is."""
        bad = NonFinite()
        if not unknown:
            bad.clean(values, 0, 0)
        rows, columns = (
            torch.tensor(sorted(set(range(n)) - set(wrong)), dtype=torch.int64)
            for n, wrong in zip(values.shape, (bad.queries, bad.train), strict=True)
        )
        return cls(values[rows][:, columns].cpu(), rows, columns, steps) if len(rows) and len(columns) else None

    def says(self, n_queries: int | None, n_columns: int, n_steps: int) -> str:
        """Which scores these are, out of how many."""
        text = f"the scores of {len(self.columns)} of {counted(n_columns, 'training example')}"
        if n_queries is not None:
            text += f" for {len(self.rows)} of {counted(n_queries, 'query')}"
        if self.steps is None:
            return text
        return f"{text}, summed over the first {len(self.steps)} of {counted(n_steps, 'checkpoint')}"


@dataclass
class Finished:
    """What is final so far.

    Args:
        queries: as many first queries have scores of all training examples.
        held: the queries after these that are at work.
        train: as many first training examples have their scores for them.
        gaps: whether tiles were left out.
        sums: over the first checkpoints, of the first tile.
        sign: a negative one flips the scores.
    """

    queries: int = 0
    held: int = 0
    train: int = 0
    gaps: bool = False
    sums: StageSums = field(default_factory=StageSums)
    sign: float = 1.0

    def part(self, matrix: Tensor | None, n_columns: int, unknown: bool = False) -> Part | None:
        """The largest part that is final; None if nothing is.

        Args:
            matrix: [query, train] as far as it is written; None: only the strongest of each query are kept.
            n_columns: how many training examples have scores.
            unknown: whether NaN is an unknown score.
        """
        if self.queries and matrix is None:
            return None if self.gaps else Part(None, torch.arange(self.queries), torch.arange(n_columns))
        if matrix is not None and self.queries:
            return Part.finite(matrix[: self.queries], unknown)
        if matrix is not None and self.train:
            return Part.finite(matrix[: self.held, : self.train], unknown)
        if self.sums.values is None or self.train:
            return None
        return Part.finite(torch.atleast_2d(self.sums.values) * self.sign, unknown, self.sums.steps)


@contextlib.contextmanager
def kept(scores: Callable[[str], Kept | None], processes: Processes) -> Iterator[None]:
    """Attach to any error inside the scores that were finished before it, and say so in its message.

    Not where examples weigh otherwise in a batch than alone: then the scores before may be wrong as well. Nor in one
    of several processes, which has parts of the scores only.

    Args:
        scores: makes them, with the given words in a note; None if there are none.
        processes: that share the work.
    """
    try:
        yield
    except (NoRelation, UnequalWeight):
        raise
    except BaseException as error:
        if processes.count > 1:
            raise
        with contextlib.suppress(Exception):  # the error itself matters more
            found = scores(f"Unfinished: {type(error).__name__} ended the computation")
            if found is not None:
                error.scores = found[0]  # type: ignore[attr-defined]
                _extend(error, f"`error.scores` holds what was finished: {found[1]}.")
        raise


def _extend(error: BaseException, text: str) -> None:
    """Add a sentence to an error's message."""
    if error.args and isinstance(error.args[0], str) and not isinstance(error, (OSError, KeyError)):
        error.args = (f"{error.args[0]} {text}", *error.args[1:])
    elif hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(text)
