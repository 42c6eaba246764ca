"""What a method is: a frozen record of hyper-parameters that turns a question into scores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Flag, auto
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lightning_influence.setting.setting import Queries, Setting, stage_positions
from lightning_influence.timing import timed
from lightning_influence.tracking import Tracker, record_name
from lightning_influence.trajectory import Trajectory

# Scores that are held at once while they are summed over checkpoints.
TILE = 2**25


class Evidence(Flag):
    """What a method must have."""

    FINAL_WEIGHTS = auto()
    """The weights after the last step, or the module as it is."""
    CHECKPOINTS = auto()
    """Weights from earlier in training, with learning rates."""
    BATCH_ORDER = auto()
    """Which examples were in each optimizer step."""
    TRACKER = auto()
    """Something that only a callback sees while training runs."""
    REFIT = auto()
    """Models trained again on parts of the data."""


class Cost(NamedTuple):
    """What a question is estimated to take.

    Args:
        seconds: in total.
        queries_at_once: queries that are held in memory together.
        checkpoints: sets of weights that are visited for each such block of queries.
    """

    seconds: float
    queries_at_once: int
    checkpoints: int


class Tile(NamedTuple):
    """How many queries, and how many training examples, one call of ``Method.score`` is for."""

    queries: int
    train: int


class Method(ABC):
    """How influence is estimated. Subclass one of the kinds as a frozen dataclass, and pass an instance.

    The kinds say how the work is done: ``GradientProduct`` (inner products of gradients at stages of training),
    ``WholeRun`` (one walk through the fit scores every example), ``ForwardOnly`` (no gradients), ``Retraining`` (models
    trained again). A method that fits none of them subclasses ``Method`` and writes ``score`` itself.

    A method sees blocks of gradients with ``dot``, ``norm2``, ``times``, ``project`` and ``dense``; never a flat
    matrix, a loader or a device. ``score`` is called for one tile of the score matrix after another.
    """

    needs: ClassVar[Evidence] = Evidence.FINAL_WEIGHTS

    @property
    def name(self) -> str:
        """The key of its scores, and what they are called."""
        return type(self).__name__

    @property
    def record(self) -> str:
        """Name of what its ``tracker`` leaves in the run's folder."""
        return record_name(self.name, self.hyperparameters())

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
        raise NotImplementedError(f"`{self.name}` has no self-influence. Use `TracInCP()`, which has.")

    def group(self, setting: Setting, queries: Queries, ids: Sequence[int]) -> Tensor | None:
        """[query]: joint influence of some training examples; None: the sum of their scores."""
        return None

    def scored(self, n_train: int) -> Sequence[int] | None:
        """Ids of the training examples that have a score, ascending; None: all. ``score`` returns a column for each."""
        return None

    def tracker(self) -> Tracker | None:
        """What follows the fit while it runs, or None: a new one for every fit."""
        return None

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """Positions of the checkpoints that are visited; [] where only the module's present weights are known."""
        if self.needs & Evidence.CHECKPOINTS:
            return stage_positions(trajectory, getattr(self, "checkpoints", None))
        return [] if trajectory is None else [len(trajectory.checkpoints) - 1]

    def unit(self, setting: Setting) -> str:
        """What one unit of a score is."""
        return "arbitrary"

    def hyperparameters(self) -> dict[str, Any]:
        """Hyper-parameters by name, as they are saved with the scores."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    # ---- size and cost --------------------------------------------------------------------------------------------

    def queries_at_once(self, setting: Setting) -> int | None:
        """How many queries may be held at once; None: as many as their gradients' factors allow."""
        return None

    def preparation_seconds(self, setting: Setting, vectors: int) -> float:
        """Estimated seconds beside the passes over the examples, per checkpoint, for this many queries."""
        return 0.0

    def tile(self, setting: Setting, queries: Queries) -> Tile:
        """The part of the score matrix that is computed at once: whole blocks of both datasets."""
        held = queries.at_once(self.queries_at_once(setting))
        size = setting.examples.block_size
        return Tile(held, max(1, TILE // min(held, len(queries)) // size) * size)

    def cost(self, setting: Setting, queries: Queries | None) -> Cost:
        """What scoring the queries (None: self-influence) will take, by timing one block of each side."""
        engine, examples = setting.engine, setting.examples
        block = next(iter(examples.blocks(0, min(len(examples), examples.block_size))))
        blocks, held = len(examples) / block.size, 1
        if queries is None:
            seconds = timed(lambda: engine.gradients(block).norm2()) * blocks
        else:
            held, columns = self.tile(setting, queries)
            some = queries[: min(held, queries.examples.block_size)]
            gradients, share = some.gradients(), len(queries) / len(some)
            backward = timed(lambda: engine.gradients(block))
            product = max(0.0, timed(lambda: gradients.dot(engine.gradients(block))) - backward)
            passes, tiles = -(-len(queries) // held), -(-len(examples) // columns)
            seconds = (backward * passes + product * share) * blocks + timed(some.gradients) * share * tiles
        seconds += self.preparation_seconds(setting, len(examples) if queries is None else len(queries))
        visited = max(1, len(self.positions(setting.trajectory)))
        return Cost(seconds * visited, held, visited)


def _plain(value: Any) -> Any:
    """A hyper-parameter that is a record itself, such as a projection, with its name."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return {"name": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
