"""The kinds of method: products of gradients at stages of training, one walk through the fit, forward passes only."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.checks import one_of
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.gradients.transforms import Transforms, check_projection, refuse_constant
from lightning_influence.methods.method import TILE, Cost, Method, Tile
from lightning_influence.numerics.projections import RandomProjection
from lightning_influence.setting.setting import Queries, Setting, Stage
from lightning_influence.timing import timed
from lightning_influence.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class TrainBlock:
    """Some consecutive training examples at one stage.

    Args:
        gradients: theirs, at the stage's weights.
        ids: which they are.
        weight: what their products count for, [group, example] by the optimizer's parameter groups; None: 1.
    """

    gradients: Gradients
    ids: range
    weight: Tensor | None


class GradientProduct(Method):
    r"""Inner products of the queries' gradients with those of training examples, summed over stages of training.

    .. math:: s(q, z) = \sum_k c_{kz} \, u_k(q) \cdot \nabla\ell(w_k, z)

    A subclass says which stages (``positions``), what the query side u is (``query_side``), and the weights c
    (``weight``); where its formula is not a plain product it writes ``product``.
    """

    def query_side(self, stage: Stage, queries: Queries) -> QueryGradients:
        """What training gradients at this stage are multiplied with; by default the queries' gradients there."""
        return stage.gradients(queries)

    def weight(self, stage: Stage) -> Tensor | None:
        """What each training example of the tile counts for at this stage, [group, train]; None: 1."""
        return None

    def product(self, stage: Stage, query: QueryGradients, block: TrainBlock) -> Tensor:
        """What this stage adds to the scores of a block of training examples, [query, example]."""
        return query.dot(block.gradients, block.weight)

    def product_with_itself(self, stage: Stage, block: TrainBlock) -> Tensor:
        """What this stage adds to the self-influence of a block of training examples, [example].

        Raises:
            NotImplementedError: the method does not offer self-influence.
        """
        return super().self_influence(stage.setting)

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]."""
        total = setting.zeros(queries)
        for stage in self.stages(setting):
            query = self.query_side(stage, queries)
            for columns, block in self._train(stage, total):
                total[:, columns] += self.product(stage, query, block)
        return total

    def self_influence(self, setting: Setting) -> Tensor:
        """[train]."""
        total = setting.zeros()
        for stage in self.stages(setting):
            for columns, block in self._train(stage, total):
                total[columns] += self.product_with_itself(stage, block)
        return total

    def stages(self, setting: Setting) -> Iterator[Stage]:
        """The module at the checkpoints of ``positions``, one after another."""
        positions = self.positions(setting.trajectory)
        if setting.trajectory is None:
            yield setting.final()
        else:
            yield from setting.stages(positions)

    def _train(self, stage: Stage, like: Tensor) -> Iterator[tuple[slice, TrainBlock]]:
        """Blocks of the tile with their columns, without those that count for nothing."""
        weight, first = self.weight(stage), stage.setting.ids.start
        weight = None if weight is None else weight.to(like)
        for columns, gradients in stage.train(None if weight is None else weight.any(0)):
            ids = range(first + columns.start, first + columns.stop)
            yield columns, TrainBlock(gradients, ids, None if weight is None else weight[:, columns])


class TransformedProduct(GradientProduct):
    """A product of gradients that are normalised or projected first, on both sides alike.

    A subclass has the fields ``normalize`` and ``projection``; see ``Transforms``.
    """

    normalize: str | None
    projection: RandomProjection | None

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, (None, "cosine", "layerwise"))
        check_projection(self.projection)

    def query_side(self, stage: Stage, queries: Queries) -> QueryGradients:
        """The queries' gradients, transformed."""
        return self._transforms(stage)(stage.gradients(queries))

    def product(self, stage: Stage, query: QueryGradients, block: TrainBlock) -> Tensor:
        """[query, example]."""
        return query.dot(self._transforms(stage)(block.gradients), block.weight)

    def product_with_itself(self, stage: Stage, block: TrainBlock) -> Tensor:
        """[example]: the squared length of each example's gradient.

        Raises:
            ValueError: gradients of one length, whose self-influence is constant.
        """
        refuse_constant(self.normalize)
        return self._transforms(stage)(block.gradients).norm2(block.weight)

    def _transforms(self, stage: Stage) -> Transforms:
        return stage.setting.state(self, Transforms, self.normalize, self.projection)


class WholeRun(Method):
    """One walk through the whole fit scores every training example: a tile is the whole training set."""

    @abstractmethod
    def seconds(self, setting: Setting, queries: Queries | None) -> float:
        """Estimated seconds that these queries (None: self-influence) take together."""

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """The final weights: earlier ones are only where a walk starts from."""
        return [] if trajectory is None else [len(trajectory.checkpoints) - 1]

    def tile(self, setting: Setting, queries: Queries) -> Tile:
        """All training examples."""
        held = queries.at_once(self.queries_at_once(setting))
        return Tile(max(1, min(held, TILE // setting.n_train)), setting.n_train)

    def cost(self, setting: Setting, queries: Queries | None) -> Cost:
        """That of one block of queries, for all of them."""
        if queries is None:
            return Cost(self.seconds(setting, None), 1, 1)
        held = min(self.tile(setting, queries).queries, len(queries))
        return Cost(self.seconds(setting, queries[:held]) * len(queries) / held, held, 1)


class ForwardOnly(Method):
    """No gradients by the parameters: none are planned or checked, and a tile is the whole training set."""

    def tile(self, setting: Setting, queries: Queries) -> Tile:
        """All training examples."""
        return Tile(max(1, TILE // setting.n_train), setting.n_train)

    def cost(self, setting: Setting, queries: Queries | None) -> Cost:
        """A forward pass of every example and query, by timing one block."""
        task, examples = setting.engine.task, setting.examples
        block = next(iter(examples.blocks(0, min(len(examples), examples.block_size))))
        with torch.no_grad():
            each = timed(lambda: task(task.to_device(block.batch))) / block.size
        held = 1 if queries is None else self.tile(setting, queries).queries
        return Cost(each * (len(examples) * (2 if queries is None else 1) + len(queries or ())), held, 1)
