"""What a method is: a frozen record of hyper-parameters that turns a setting and queries into scores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Flag, auto
from typing import Any, ClassVar

from torch import Tensor

from lightning_influence.setting.setting import Queries, Setting, stage_positions
from lightning_influence.tracking import Tracker
from lightning_influence.trajectory import Trajectory


class Evidence(Flag):
    """What a method must have."""

    FINAL_WEIGHTS = auto()
    """The weights after the last step, or the module as it stands."""
    CHECKPOINTS = auto()
    """Weights on the way, with learning rates."""
    BATCH_ORDER = auto()
    """Which examples were in each optimizer step."""
    TRACKER = auto()
    """Something that only a callback sees while training runs."""
    REFIT = auto()
    """Models trained again on parts of the data."""


class Method(ABC):
    """How influence is estimated. Subclass as a frozen dataclass: one file, passed as an instance, no registry.

    A method sees gradient blocks with ``dot``, ``norm2``, ``times``, ``project`` and ``dense``; never a flat matrix,
    a loader or a device. The driver calls it for one tile of training examples after another and puts them together.
    """

    needs: ClassVar[Evidence] = Evidence.FINAL_WEIGHTS
    gradients: ClassVar[bool] = True
    """Whether it takes gradients by the parameters; if not, no self-check of them is made."""
    whole: ClassVar[bool] = False
    """A tile is the whole training set, and losses are taken one example at a time: they need not divide."""
    measures: ClassVar[bool] = True
    """It looks at the queries' loss, or at what ``measurement=`` puts in its place."""
    unknowns: ClassVar[bool] = False
    """NaN in its scores means unknown, not broken."""
    walks: ClassVar[bool] = False
    """One walk through the fit scores every example: a tile is the whole training set."""

    @abstractmethod
    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """Scores of the queries against the training examples of the setting's tile.

        Positive means that the training example made the query better (a proponent).

        Returns:
            [query, train].
        """

    def self_influence(self, setting: Setting) -> Tensor:
        """Score of every training example of the tile on itself, [train].

        Raises:
            NotImplementedError: the method does not offer it.
        """
        raise NotImplementedError(f"`{type(self).__name__}` has no self-influence. Use `TracInCP()`, which has.")

    def group(self, setting: Setting, queries: Queries, ids: Sequence[int]) -> Tensor | None:
        """[query]: what some training examples did together; None: the sum of their scores."""
        return None

    def scored(self, n_train: int) -> Sequence[int] | None:
        """Ids of the training examples that have a score, ascending; None: all. ``score`` returns a column for each."""
        return None

    def tracker(self) -> Tracker | None:
        """What watches the fit while it runs, or None: a new one for every fit."""
        return None

    def at_once(self, setting: Setting) -> int | None:
        """How many queries may be held at once; None: as many as their gradients' factors allow."""
        return None

    def seconds(self, setting: Setting, queries: Queries) -> float | None:
        """What scoring these queries will take; None: so many passes over the examples as there are checkpoints."""
        return None

    def overhead(self, setting: Setting, queries: int) -> float:
        """Seconds beside the passes over the examples, at each set of weights, for so many queries."""
        return 0.0

    def unit(self, setting: Setting) -> str:
        """What one unit of a score is."""
        return "arbitrary"

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """Positions of the checkpoints that a score looks at (for the plan and the record)."""
        if self.needs & Evidence.CHECKPOINTS:
            return stage_positions(trajectory, getattr(self, "checkpoints", None))
        return [] if trajectory is None else [len(trajectory.checkpoints) - 1]

    def settings(self) -> dict[str, Any]:
        """Hyper-parameters by name, for the record."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """A setting that is a record itself, such as a projection, with its name."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return {"name": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
