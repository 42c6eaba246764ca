"""The base class of all methods: a frozen record of hyper-parameters that computes scores for a question."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Flag, auto
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lightning_influence.hints import HintedArguments
from lightning_influence.setting.checkpoints import stage_positions
from lightning_influence.setting.samples import Samples, first_queries
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.timing import Work, timed
from lightning_influence.tracking.record import record_name
from lightning_influence.tracking.tracker import Tracker
from lightning_influence.trajectory import Trajectory
from lightning_influence.wording import counted

_EXAMPLES = {"curvature": "EKFAC()"}  # of arguments without a default

# Scores in memory at once while they are summed over checkpoints.
TILE = 2**25


class Evidence(Flag):
    """What a method needs besides the module and its training data."""

    FINAL_WEIGHTS = auto()
    """The weights after the last optimizer step, or the module as it is."""
    CHECKPOINTS = auto()
    """Weights at several points of training, with learning rates."""
    BATCH_ORDER = auto()
    """Which examples were in each optimizer step."""
    TRACKER = auto()
    """What the method's own ``tracker`` records while training runs."""
    REFIT = auto()
    """Models retrained on parts of the data."""


class Cost(NamedTuple):
    """The estimated cost of scoring.

    Args:
        seconds: in total.
        queries_at_once: how many queries are in memory together.
        checkpoints: how many checkpoints are visited for each such block of queries.
        work: what the seconds are made of.
    """

    seconds: float
    queries_at_once: int
    checkpoints: int
    work: tuple[Work, ...] = ()

    def __str__(self) -> str:
        pieces = "".join(f"\n  {piece}" for piece in sorted(self.work, key=lambda piece: -piece.seconds))
        held, visited = counted(self.queries_at_once, "query"), counted(self.checkpoints, "checkpoint")
        return f"about {self.seconds:.3g} s, with {held} at once and {visited} visited{pieces}"

    def of_share(self, fraction: float, *besides: Work) -> "Cost":
        """That of a share of the work, and of other work besides."""
        pieces = (*besides, *(piece._replace(times=piece.times * fraction) for piece in self.work))
        seconds = self.seconds * fraction + sum(piece.seconds for piece in besides)
        return self._replace(seconds=seconds, work=pieces)


class Tile(NamedTuple):
    """The size of the part of the score matrix that one call of ``Method.score`` computes."""

    queries: int
    train: int


# What earlier versions called parts of a method, which would be ignored without a word, and what they are now.
_EARLIER = {
    "gradients": "the kind `ForwardOnly`",
    "whole": "the kinds `WholeRun` and `ForwardOnly`",
    "walks": "the kind `WholeRun`",
    "measures": "`Queries.measured`",
    "unknowns": "the kind `Retraining`",
    "settings": "`hyperparameters`",
    "at_once": "`queries_at_once`",
    "overhead": "`preparation_seconds`",
}


class Method(HintedArguments, ABC):
    """How influence is estimated. To write your own, subclass one of the kinds as a frozen dataclass.

    The kinds: ``GradientProduct`` (inner products of gradients at checkpoints), ``WholeRun`` (scores all training
    examples at once), ``ForwardOnly`` (takes no gradients) and ``Retraining`` (compares retrained models). A method
    that fits none of them subclasses ``Method`` and implements ``score``.

    ``score`` is called for one tile of the score matrix after another. Gradients come in blocks with the operations
    ``dot``, ``norm2``, ``times``, ``project`` and ``dense``; a method needs no flat matrix, DataLoader or device.
    """

    needs: ClassVar[Evidence] = Evidence.FINAL_WEIGHTS
    reads_optimizer: ClassVar[bool] = False
    """Whether it reads the optimizer's state at checkpoints between the first and the last."""
    quantity: ClassVar[str] = "self-influence"
    """What ``self_influence`` returns, in words."""

    def __init_subclass__(cls) -> None:
        """Raises TypeError for a flag or method that earlier versions asked for and that nothing reads any more."""
        super().__init_subclass__()
        for name, now in _EARLIER.items():
            no_field = "ClassVar" in str(cls.__annotations__.get(name, ClassVar))
            if name in cls.__dict__ and no_field:
                raise TypeError(f"Expected no `{cls.__name__}.{name}`, which was replaced by {now}, got one.")

    @property
    def name(self) -> str:
        """The name under which the scores are listed and logged."""
        return type(self).__name__

    @property
    def record(self) -> str:
        """Name, in the run's folder, of what the method's ``tracker`` recorded."""
        return record_name(self.name, self.hyperparameters())

    @abstractmethod
    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """Score the training examples of the current tile (``setting.ids``) for each query.

        A positive score means that the training example improves the query (a proponent): training on it lowers the
        query's loss.

        Returns:
            [query, train].
        """

    def self_influence(self, setting: Setting) -> Tensor:
        """Score each training example of the tile with itself as the query, [train]; those not ``scored`` are dropped.

        Raises:
            NotImplementedError: the method does not implement it.
        """
        raise NotImplementedError(f"`{self.name}` has no self-influence. Use `TracInCP()`, which has.")

    def group(self, setting: Setting, queries: Queries, ids: Sequence[int]) -> Tensor | None:
        """Joint influence of the training examples ``ids``, [query]; None: take the sum of their scores."""
        return None

    def scored(self, n_train: int) -> Sequence[int] | None:
        """Ids of the training examples that get scores, ascending; None: all.

        ``score`` returns a column for every training example of the tile; the columns of the others are dropped.
        """
        return None

    def follows_batch_index(self) -> bool:
        """Whether the method takes each training example at the index (``batch_idx``) of each step with it.

        Other methods are refused where the loss depends on the index. A ``GradientProduct`` whose ``weight`` is
        ``stage.exposure`` may return True: it is then called for the visits at each index apart.
        """
        return False

    def tracker(self) -> Tracker | None:
        """A new tracker, which records what the method needs while training runs; None: the method needs none."""
        return None

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """Positions, in the trajectory, of the checkpoints that the method visits; [] without a trajectory."""
        if self.needs & Evidence.CHECKPOINTS:
            return stage_positions(trajectory, getattr(self, "checkpoints", None))
        return [] if trajectory is None else [len(trajectory.checkpoints) - 1]

    def unit(self, setting: Setting) -> str:
        """The unit of the scores, such as ``"loss"``."""
        return "arbitrary"

    def hyperparameters(self) -> dict[str, Any]:
        """Hyper-parameters by name, to be saved with the scores."""
        names: list[str] = [f.name for f in fields(self)] if is_dataclass(self) else []
        return {name: _plain(getattr(self, name)) for name in names}

    # ---- size and cost --------------------------------------------------------------------------------------------

    def queries_at_once(self, setting: Setting) -> int | None:
        """The most queries to have in memory at once; None: limited only by the size of their gradients."""
        return None

    def preparation_seconds(self, setting: Setting, vectors: int) -> float:
        """Estimated seconds per checkpoint for work besides the gradients and their products.

        Args:
            setting: the question.
            vectors: how many queries there are, or training examples for self-influence.
        """
        return 0.0

    def tile(self, setting: Setting, queries: Queries) -> Tile:
        """The size of a tile of the score matrix: whole blocks of both datasets."""
        held = queries.at_once(self.queries_at_once(setting))
        size = setting.examples.block_size
        return Tile(held, max(1, TILE // min(held, len(queries)) // size) * size)

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """What scoring the queries (None: self-influence) is made of: how often each piece is done, and its seconds.

        By default one pass over the training examples for each block of queries and checkpoint. Pieces are timed on a
        block of examples; ``Samples`` has the usual ones.
        """
        samples, visited = Samples.of(setting), self._visited(setting)
        preparation = Work("preparation", visited, self.preparation_seconds(setting, _vectors(setting, queries)))
        if queries is None:
            own = samples.with_gradients(lambda block: block.norm2())
            return [preparation, *samples.passes(visited), Work("norms", visited * setting.n_train, own)]
        held, columns = self.tile(setting, queries)
        gradients = first_queries(queries)[:held].gradients()
        backward = timed(first_queries(queries)[:held].gradients) / len(gradients)
        products = samples.with_gradients(gradients.dot) / len(gradients)
        tiles = -(-len(setting.examples) // columns)
        return [
            preparation,
            *samples.passes(visited * -(-len(queries) // held)),
            Work("gradients of queries", visited * tiles * len(queries.ids), backward),
            Work("products", visited * setting.n_train * len(queries), products),
        ]

    def cost(self, setting: Setting, queries: Queries | None) -> Cost:
        """Estimate the cost of scoring the queries (None: of self-influence): the sum of its ``work``."""
        pieces = self.work(setting, queries)
        held = 1 if queries is None else min(self.tile(setting, queries).queries, len(queries))
        return Cost(sum(piece.seconds for piece in pieces), max(1, held), self._visited(setting), tuple(pieces))

    def _visited(self, setting: Setting) -> int:
        """How many checkpoints are visited for each block of queries; 1 without a trajectory."""
        return max(1, len(self.positions(setting.trajectory)))


def how_to_write(given: Any) -> str:
    """What to write in the place of a method's class or name; empty for anything else."""
    if isinstance(given, str):
        return f"Write `{given.removesuffix('()')}()`, without quotes."
    if not isinstance(given, type):
        return ""
    required = [one.name for one in fields(given) if _required(one)] if is_dataclass(given) else []
    return f"Make one: `{given.__name__}({', '.join(_EXAMPLES.get(name, name) for name in required)})`."


def _required(field: Field[Any]) -> bool:
    return field.init and field.default is MISSING and field.default_factory is MISSING


def _vectors(setting: Setting, queries: Queries | None) -> int:
    """How many queries there are, or training examples for self-influence."""
    return setting.n_train if queries is None else len(queries)


def _plain(value: Any) -> Any:
    """A dataclass, such as a projection, becomes a dict with its class name; anything else stays as it is."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return {"name": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
