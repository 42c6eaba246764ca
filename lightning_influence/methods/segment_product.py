"""The kind of method that sums the gradients of training examples over checkpoints before it multiplies with them."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_influence.gradients import Gradients
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.gradients.running_sum import RunningSum, SumCosts
from lightning_influence.methods.kinds import GradientProduct, TrainBlock
from lightning_influence.methods.method import Tile
from lightning_influence.setting.samples import Samples
from lightning_influence.setting.setting import GRADIENT_BYTES, Queries, Setting, Stage, whole_blocks
from lightning_influence.timing import Work, seconds_of, timed

# Loading one parameter of a checkpoint takes about as long as this many multiply-adds.
_LOADING = 256
# Training examples whose gradients are counted.
_SAMPLED = 4
# Training examples whose products are timed for an estimate.
_TIMED = 64


class SegmentProduct(GradientProduct):
    r"""Inner products of gradients in which the checkpoints of a segment of training share the queries' side.

    .. math:: s(q, z) = \sum_l u_l(q) \cdot \sum_{k \in l} c_{kz} \, \nabla\ell(w_k, z)

    The inner sum is made first, for as many training examples as fit in memory, and multiplied once per segment. Where
    it would not fit, or take more operations, there is a product per checkpoint instead: ``product`` gets sums over a
    segment, or gradients at one of its checkpoints. A subclass has ``checkpoints_by_segment`` and ``directions``.
    """

    @abstractmethod
    def checkpoints_by_segment(self, setting: Setting) -> Sequence[Sequence[int]]:
        """The positions of each segment's checkpoints in the trajectory, in all those of ``positions``."""

    @abstractmethod
    def directions(self, setting: Setting, queries: Queries) -> Sequence[QueryGradients]:
        """The vectors u of the queries for each segment. Other checkpoints may be loaded to compute them."""

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """Sum ``product`` over segments, [query, train]."""
        directions = self.directions(setting, queries)  # before the loop over stages, because it loads others
        total = setting.zeros(queries)
        for positions, vectors in zip(self.checkpoints_by_segment(setting), directions, strict=True):
            for stage, columns, block in self.blocks(setting, positions, total):
                values = self.product(stage, vectors, block)
                total[:, columns] += self._shaped(values, "product", total[:, columns].shape)
        return total

    def blocks(
        self, setting: Setting, positions: Sequence[int], like: Tensor
    ) -> Iterator[tuple[Stage, slice, TrainBlock]]:
        """The blocks of the tile in one segment, whose products add up to its part of the scores.

        Args:
            setting: the question.
            positions: of the segment's checkpoints.
            like: has the dtype and device of the scores.

        Yields:
            The stage loaded last, the block's columns in the tile, and the block.
        """
        order = setting.state(self, _Order)
        summed = order.summed and setting.examples.block_size >= order.block_size
        sums: dict[int, tuple[slice, range, RunningSum]] = {}
        for stage in setting.stages(positions):
            for columns, block in self._train(stage, like):
                assert isinstance(columns, slice)  # no method of this kind follows the index of a batch
                if not summed:
                    yield stage, columns, block
                    continue
                sums.setdefault(columns.start, (columns, block.ids, RunningSum()))[2].add(_weighted(block))
        for start in list(sums):
            columns, ids, total = sums.pop(start)
            yield stage, columns, TrainBlock(total.result(), ids, None)

    # ---- size and cost --------------------------------------------------------------------------------------------

    def tile(self, setting: Setting, queries: Queries) -> Tile:
        """As many training examples as have sums in half a GiB, unless a product per checkpoint is cheaper."""
        held, columns = super().tile(setting, queries)
        size, segments = min(setting.examples.block_size, setting.n_train), self.checkpoints_by_segment(setting)
        some = next(setting.examples.blocks(0, min(_SAMPLED, setting.n_train)))
        longest = max(len(positions) for positions in segments)
        gradients = setting.engine.gradients(some, checked=False)
        costs = SumCosts.of(gradients, longest, min(held, len(queries)))
        fit = min(columns, whole_blocks(max(1, GRADIENT_BYTES // max(1, costs.bytes)), size))
        parameters = setting.task.named_parameters()
        loaded = sum(parameters[name].numel() for name in setting.engine.plan.names) * longest * _LOADING
        again = (-(-setting.n_train // fit) - 1) * loaded
        summed = fit >= size and setting.n_train * costs.summed + again < setting.n_train * costs.apart
        order = setting.state(self, _Order)
        order.summed, order.block_size = summed, setting.examples.block_size
        return Tile(held, fit if summed else columns)

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """A pass over the training examples for each checkpoint, in the order that a tile takes, sums and products."""
        if queries is None:
            return super().work(setting, None)
        samples, visited = Samples.of(setting), self._visited(setting)
        held, columns = self.tile(setting, queries)
        count, tiles = min(held, len(queries)), -(-setting.n_train // columns)
        product = self._product_seconds(setting, samples.gradients(), count) / count
        passes = visited * -(-len(queries) // held)
        return [
            Work("preparation", visited, self.preparation_seconds(setting, len(queries))),
            Work("checkpoints", passes * tiles, seconds_of(setting.final)),
            *samples.passes(passes),
            Work("sums and products", setting.n_train * len(queries), product),
        ]

    def _product_seconds(self, setting: Setting, gradients: Gradients, count: int) -> float:
        """Seconds of all products of one training example with ``count`` queries, and of its sums."""
        few, parameters = gradients.slice(slice(0, _TIMED)), setting.task.named_parameters()
        zeros = {name: parameters[name].new_zeros(count, *parameters[name].shape) for name in setting.engine.plan.names}
        vectors, segments = DenseQueries(zeros, setting.engine.groups), self.checkpoints_by_segment(setting)
        if not setting.state(self, _Order).summed:
            return timed(lambda: vectors.dot(few)) * len(self.positions(setting.trajectory)) / len(few)

        def one_segment() -> Tensor:
            total = RunningSum()
            for _ in max(segments, key=len):
                total.add(few)
            return vectors.dot(total.result())

        return timed(one_segment) * len(segments) / len(few)


@dataclass
class _Order:
    """Whether gradients are summed before they are multiplied.

    Args:
        summed: whether that is cheaper.
        block_size: when this was found; if blocks are smaller now, memory did not suffice, and nothing is summed.
    """

    summed: bool = False
    block_size: int = 0


def _weighted(block: TrainBlock) -> Gradients:
    """A block's gradients times the weights of their products."""
    gradients, weight = block.gradients, block.weight
    if weight is None:
        return gradients
    return gradients.scaled({names: weight[gradients.groups.get(names, 0)] for names in gradients.parts})
