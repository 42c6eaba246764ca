"""The kinds of method: products of gradients at checkpoints, all training examples at once, forward passes only."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.checks import one_of
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.queries import QueryGradients
from lightning_influence.gradients.transforms import Transforms, check_projection, refuse_constant, scale
from lightning_influence.methods.method import TILE, Evidence, Method, Tile
from lightning_influence.numerics.projections import RandomProjection
from lightning_influence.setting.batch_index import visit_blocks, visits_per_example
from lightning_influence.setting.samples import Samples, first_queries
from lightning_influence.setting.setting import Queries, Setting, Stage
from lightning_influence.timing import Work, seconds_of
from lightning_influence.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class TrainBlock:
    """A block of consecutive training examples at one stage.

    Args:
        gradients: their gradients at the stage's weights.
        ids: their ids.
        weight: factors of their products, [group, example], with the optimizer's parameter groups; None: 1.
    """

    gradients: Gradients
    ids: range
    weight: Tensor | None


@dataclass(frozen=True, eq=False)
class VisitBlock(TrainBlock):
    """Visits of any training examples at one index of a batch (``batch_idx``), where the loss depends on the index."""

    ids: Sequence[int]  # type: ignore[assignment]


@dataclass
class StageSums:
    """The sums over the first checkpoints, which remain right where a later checkpoint fails.

    Args:
        steps: of these checkpoints; None: of all.
        values: [query, train] or [train]; None: there are none.
    """

    steps: list[int] | None = None
    values: Tensor | None = None


class GradientProduct(Method):
    r"""Inner products of the gradients of queries and training examples, summed over checkpoints.

    .. math:: s(q, z) = \sum_k c_{kz} \, u_k(q) \cdot \nabla\ell(w_k, z)

    with u the query side, by default the query's gradient, and weights c, by default 1. A subclass overrides what it
    needs: ``positions`` for the checkpoints, ``query_side`` for u, ``weight`` for c, ``product`` for another formula,
    and ``product_with_itself`` to offer self-influence, such as ``block.gradients.norm2(block.weight)``.

    By default the sum is over all checkpoints with ``needs = Evidence.CHECKPOINTS``, otherwise it is the last alone. A
    ``Stage`` has its ``position`` in the trajectory, the ``exposure`` of the examples and the ``learning_rates``.
    """

    def query_side(self, stage: Stage, queries: Queries) -> QueryGradients:
        """The vectors u that training gradients at this stage are multiplied with; by default the queries' own."""
        return stage.gradients(queries)

    def weight(self, stage: Stage) -> Tensor | None:
        """The weights c of the training examples of the tile at this stage, such as ``stage.exposure``; None: 1.

        Returns:
            [group, train], a row for each of the optimizer's parameter groups.
        """
        return None

    def product(self, stage: Stage, query: QueryGradients, block: TrainBlock) -> Tensor:
        """This stage's part of the scores of a block of training examples, [query, example].

        Weights are for each group of parameters: pass ``block.weight`` to ``dot``, do not multiply the result by it.
        """
        return query.dot(block.gradients, block.weight)

    def product_with_itself(self, stage: Stage, block: TrainBlock) -> Tensor:
        """This stage's part of the self-influence of a block of training examples, [example].

        Raises:
            NotImplementedError: the method has no self-influence.
        """
        return super().self_influence(stage.setting)

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """Sum ``product`` over stages, [query, train]."""
        total = setting.zeros(queries)
        for stage in self.stages(setting):
            query = self.query_side(stage, queries)
            for columns, block in self._train(stage, total):
                total[:, columns] += self._shaped(self.product(stage, query, block), "product", total[:, columns].shape)
            self._summed(stage, total)
        return total

    def self_influence(self, setting: Setting) -> Tensor:
        """Sum ``product_with_itself`` over stages, [train]."""
        total = setting.zeros()
        for stage in self.stages(setting):
            for columns, block in self._train(stage, total):
                values = self.product_with_itself(stage, block)
                total[columns] += self._shaped(values, "product_with_itself", total[columns].shape)
            self._summed(stage, total)
        return total

    def stages(self, setting: Setting) -> Iterator[Stage]:
        """Load the checkpoints of ``positions`` one after another; without a trajectory, the module as it is."""
        positions = self.positions(setting.trajectory)
        return iter([setting.final()]) if setting.trajectory is None else setting.stages(positions)

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """A pass over the training examples for each checkpoint and block of queries, and the products.

        ``query_side`` and the products are timed at the first checkpoint. Where the loss depends on ``batch_idx``, an
        example takes a pass for each index that it met.
        """
        visited, samples = self._visited(setting), Samples.of(setting)
        visits = visits_per_example(setting, self.positions(setting.trajectory))
        loaded = seconds_of(lambda: next(self.stages(setting)))
        stage = next(self.stages(setting))
        weight = self.weight(stage)
        ids = range(samples.block.size)
        weight = None if weight is None else weight.to(setting.zeros())[:, : len(ids)]

        def each(product: Callable[[TrainBlock], Tensor]) -> float:
            return samples.with_gradients(lambda gradients: product(TrainBlock(gradients, ids, weight)))

        n_train, prepared = visited * visits * setting.n_train, self.preparation_seconds
        if queries is None:
            try:
                product = each(lambda block: self.product_with_itself(stage, block))
            except NotImplementedError:  # raised at once when it is asked for
                return []
            return [
                Work("preparation", visited, prepared(setting, setting.n_train)),
                Work("checkpoints", visited, loaded),
                *samples.passes(visited, visits),
                Work("products", n_train, product),
            ]
        held, columns = self.tile(setting, queries)
        some = first_queries(queries)[:held]
        sides: list[QueryGradients] = []
        sided = seconds_of(lambda: sides.append(self.query_side(stage, some)))  # once: a method may keep it
        first = seconds_of(lambda: self.product(stage, sides[-1], TrainBlock(samples.gradients(), ids, weight)))
        product = each(lambda block: self.product(stage, sides[-1], block))
        once = max(0.0, first - (product + samples.backward) * len(ids))  # what is prepared at the first product
        blocks, tiles = -(-len(queries) // held), -(-setting.n_train // columns)
        return [
            Work("preparation", visited, prepared(setting, len(queries))),
            Work("checkpoints", visited * blocks * tiles, loaded),
            *samples.passes(visited * blocks, visits),
            Work("gradients of queries", visited * tiles * len(queries.ids), sided / len(some)),
            Work("first products", visited * blocks * tiles, once),
            Work("products", n_train * len(queries), product / len(some)),
        ]

    def _train(self, stage: Stage, like: Tensor) -> Iterator[tuple[slice | Tensor, TrainBlock]]:
        """The blocks of the tile and their columns in it; blocks whose weights are all 0 are skipped."""
        if stage.by_index:
            for chosen, weights, gradients in visit_blocks(stage):
                visited = torch.as_tensor(chosen, device=like.device) - stage.setting.ids.start
                yield visited, VisitBlock(gradients, chosen, weights.to(like))
            return
        weight, first = self.weight(stage), stage.setting.ids.start
        where = None
        if weight is not None:
            weight = self._shaped(weight, "weight", stage.exposure.shape)
            where, weight = weight.any(0).cpu(), weight.to(like)
        for columns, gradients in stage.train(where):
            ids = range(first + columns.start, first + columns.stop)
            yield columns, TrainBlock(gradients, ids, None if weight is None else weight[:, columns])

    def _summed(self, stage: Stage, total: Tensor) -> None:
        """Called with the sum up to a stage."""

    def _shaped(self, value: Tensor, what: str, shape: torch.Size) -> Tensor:
        """The value. Raises ValueError for another shape, which torch might broadcast to scores that are wrong."""
        if not isinstance(value, Tensor) or value.shape != shape:
            got = list(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"Expected `{self.name}.{what}` to return a tensor of shape {list(shape)}, got {got}.")
        return value


class TransformedProduct(GradientProduct):
    """Inner products of gradients that are first normalised, projected or both.

    A subclass has the fields ``normalize`` and ``projection``; see ``Transforms``.
    """

    normalize: str | None
    projection: RandomProjection | None

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, (None, "cosine", "layerwise"))
        check_projection(self.projection)

    def query_side(self, stage: Stage, queries: Queries) -> QueryGradients:
        """The transformed gradients of the queries."""
        if self.normalize is not None:
            stage.setting.note(scale(self.normalize, Evidence.CHECKPOINTS in self.needs))
        return self._transforms(stage)(stage.gradients(queries))

    def product(self, stage: Stage, query: QueryGradients, block: TrainBlock) -> Tensor:
        """Products with the transformed gradients of the block, [query, example]."""
        return query.dot(self._transforms(stage)(block.gradients), block.weight)

    def product_with_itself(self, stage: Stage, block: TrainBlock) -> Tensor:
        """The squared norm of each example's gradient, [example]."""
        return self._transforms(stage)(block.gradients).norm2(block.weight)

    def self_influence(self, setting: Setting) -> Tensor:
        """Sum the squared norms over stages, [train].

        Raises:
            ValueError: normalised gradients, whose self-influence is the same for all examples.
        """
        refuse_constant(self.normalize)
        return super().self_influence(setting)

    def _summed(self, stage: Stage, total: Tensor) -> None:
        """Keeps the sum, should a later stage fail, unless a subclass makes something else of it."""
        positions, kind = self.positions(stage.setting.trajectory), type(self)
        own = kind.score is GradientProduct.score and kind.self_influence is TransformedProduct.self_influence
        if own and self.scored(0) is None and stage.position in positions[:-1]:
            sums = stage.setting.state("sums", StageSums)
            steps = [] if stage.position == positions[0] else sums.steps or []
            sums.steps, sums.values = [*steps, stage.step], total.clone()

    def _transforms(self, stage: Stage) -> Transforms:
        return stage.setting.state(self, Transforms, self.normalize, self.projection)


class WholeRun(Method):
    """Scores all training examples at once, as by one replay of the fit: a tile is the whole training set."""

    @abstractmethod
    def seconds(self, setting: Setting, queries: Queries | None) -> float:
        """Estimated seconds for one block of queries (None: for self-influence)."""

    def follows_batch_index(self) -> bool:
        """True: what a replay or a tracker computes follows the fit."""
        return True

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """Only the last checkpoint: a replay starts from earlier ones, but no score is reported for them."""
        return [] if trajectory is None else [len(trajectory.checkpoints) - 1]

    def tile(self, setting: Setting, queries: Queries) -> Tile:
        """As many queries as fit, and all training examples."""
        held = queries.at_once(self.queries_at_once(setting))
        return Tile(max(1, min(held, TILE // setting.n_train)), setting.n_train)

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """The ``seconds`` of one block of queries, for all of them."""
        if queries is None:
            return [Work("self-influence", 1, self.seconds(setting, None))]
        held = min(self.tile(setting, queries).queries, len(queries))
        return [Work("blocks of queries", len(queries) / held, self.seconds(setting, queries[:held]))]


class ForwardOnly(Method):
    """Takes no gradients, so their self-check is skipped; a tile is the whole training set."""

    def tile(self, setting: Setting, queries: Queries) -> Tile:
        """As many queries as fit, and all training examples."""
        return Tile(max(1, TILE // setting.n_train), setting.n_train)

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """One forward pass per training example and query."""
        samples = Samples.of(setting)
        asked = setting.n_train if queries is None else len(queries.ids)
        prepared = self.preparation_seconds(setting, asked)
        forward = Work("forward passes", setting.n_train + asked, samples.forward)
        return [Work("preparation", 1, prepared), samples.reading(), forward]
