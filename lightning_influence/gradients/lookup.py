"""Per-sample gradients of an embedding table: output gradients, added up per looked-up id."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_influence.devices import workspace
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import TRAFFIC, Part, one_row_per_example
from lightning_influence.numerics.projections import KroneckerSketch, Sketch


@dataclass(frozen=True, eq=False)
class Lookup(Part):
    """Gradients of an embedding table: row v of example n's is the sum of ``outputs[n, t]`` over all t with id v.

    Args:
        ids: the rows that were looked up, [example, position]; -1 for positions without a gradient (padding).
        outputs: gradients with respect to the embeddings, [example, position, width].
        shape: the table's shape, (rows, width).
    """

    ids: Tensor
    outputs: Tensor
    shape: tuple[int, ...]

    @property
    def like(self) -> Tensor:
        """Any tensor of this part: its dtype and device."""
        return self.outputs

    def slice(self, rows: slice) -> "Lookup":
        """The same for some of the examples."""
        return replace(self, ids=self.ids[rows], outputs=self.outputs[rows])

    def scaled(self, factor: Tensor) -> "Lookup":
        """Each example's gradient times its own number."""
        return replace(self, outputs=self.outputs * one_row_per_example(factor, self.outputs))

    @cached_property
    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, examples and summed gradients with one entry per pair of id and example, sorted by id."""
        ids, n = self.ids.flatten(), max(1, len(self))
        taken = (ids >= 0).nonzero()[:, 0]
        key = ids[taken] * n + taken // max(1, self.ids.shape[1])
        unique, inverse = key.unique(sorted=True, return_inverse=True)
        summed = self.outputs.new_zeros(len(unique), self.outputs.shape[-1])
        summed.index_add_(0, inverse, self.outputs.flatten(0, 1)[taken])
        return unique // n, unique % n, summed

    @cached_property
    def _runs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The distinct ids, where each begins among the ids of ``_merged``, and how often it occurs there."""
        ids, counts = self._merged[0].unique_consecutive(return_counts=True)
        return ids, counts.cumsum(0) - counts, counts

    def dense(self) -> tuple[Tensor, ...]:
        """[example, *table shape]: mostly zeros."""
        table = self.outputs.new_zeros(len(self), *self.shape)
        ids, examples, summed = self._merged
        table[examples, ids] = summed
        return (table,)

    def add_to(self, rows: tuple[Tensor, ...]) -> None:
        """Add the rows that were looked up."""
        ids, examples, summed = self._merged
        rows[0].index_put_((examples, ids), summed, accumulate=True)

    def accumulate_dot(self, other: Part, out: Tensor) -> None:
        """``out[i, j] += <gradient i of self, gradient j of other>``, a join over the ids that both looked up."""
        if isinstance(other, OuterProducts):
            self._accumulate_tied(other, out)
            return
        if not isinstance(other, Lookup):
            other.accumulate_dot(self, out.T)
            return
        _, my_examples, mine = self._merged
        _, their_examples, theirs = other._merged
        if not len(mine) or not len(theirs):
            return
        runs = _common_runs(self._runs, other._runs)
        # An id that many examples share takes one small matrix product; all rare ids are gathered pair by pair.
        pairs = runs[:, 1] * runs[:, 3]
        frequent = pairs >= _pairs_for_a_product(mine.device)
        ends = pairs.masked_fill_(frequent, 0).cumsum(0)
        n_frequent, n_pairs = torch.stack([frequent.sum(), ends[-1]]).tolist()
        for a, n_a, b, n_b in runs[frequent].tolist() if n_frequent else ():
            tile = mine[a : a + n_a] @ theirs[b : b + n_b].T
            out.index_put_((my_examples[a : a + n_a, None], their_examples[None, b : b + n_b]), tile, accumulate=True)
        step = max(1, workspace(mine.device) // max(1, mine.shape[1]))
        for start in range(0, n_pairs, step):
            i, j = _pairs(runs, ends, start, min(start + step, n_pairs))
            values = torch.linalg.vecdot(mine[i], theirs[j])
            out.index_put_((my_examples[i], their_examples[j]), values, accumulate=True)

    def _accumulate_tied(self, other: OuterProducts, out: Tensor) -> None:
        """The products where the table is also the weight of a linear layer, whose gradients are ``other``."""
        ids, mine, s = self.ids.flatten(), self.outputs.flatten(0, 1), self.ids.shape[1]
        counts = (ids >= 0).to(mine)[:, None]
        t = other.outputs.shape[1]
        step = max(1, workspace(mine.device) // max(1, len(ids) * t))
        for start in range(0, len(other), step):
            part = other.slice(slice(start, start + step))
            product = (mine * counts) @ part.inputs.flatten(0, 1).T
            product *= part.outputs.flatten(0, 1).T[ids.clamp_min(0)]
            summed = product.view(len(self), s, len(part), t).sum((1, 3))
            if part.factor is not None:
                summed *= part.factor
            out[:, start : start + step] += summed

    def norm2(self) -> Tensor:
        """[example]: squared length of each example's gradient."""
        _, examples, summed = self._merged
        norms = self.outputs.new_zeros(len(self))
        return norms.index_add_(0, examples, summed.square().sum(1))

    def times(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: inner product of each example's gradient with one table-shaped vector."""
        looked_up = vectors[0][self.ids.clamp_min(0)] * (self.ids >= 0)[..., None]
        return (looked_up * self.outputs).sum((1, 2))

    def times_own(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[example]: the inner product of each example's gradient with its own table."""
        ids, examples, summed = self._merged
        products = torch.linalg.vecdot(vectors[0][examples, ids].to(summed), summed)
        return self.outputs.new_zeros(len(self)).index_add_(0, examples, products)

    def weighted_norm2(self, weights: tuple[Tensor, ...]) -> Tensor:
        """[weighting, example]: sums of squared entries times weights, of the rows that were looked up."""
        ids, examples, summed = self._merged
        products = (weights[0][:, ids] * summed.square()).sum(2)
        return self.outputs.new_zeros(len(products), len(self)).index_add_(1, examples, products)

    def times_each(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[vector, example]: inner products with several tables, of which only the rows looked up are read."""
        ids, examples, summed = self._merged
        tables = vectors[0]
        product = tables.new_zeros(len(tables), len(self))
        rows_of, starts, counts = self._runs
        frequent = counts * len(tables) >= _pairs_for_a_product(tables.device)
        rare = (~frequent).repeat_interleave(counts, output_size=len(ids)).nonzero()[:, 0]
        heads = torch.stack([rows_of, starts, counts], 1)
        for row, start, count in heads[frequent].tolist() if len(rare) < len(ids) else ():
            some = slice(start, start + count)
            product.index_add_(1, examples[some], tables[:, row] @ summed[some].T)
        for some in rare.split(max(1, workspace(tables.device) // max(1, len(tables) * summed.shape[1]))):
            values = torch.linalg.vecdot(tables[:, ids[some]], summed[some])
            product.index_add_(1, examples[some], values)
        return product

    def operations(self, n_vectors: int) -> int:
        """Multiply-adds per example of ``times_each``, or passes over as many numbers."""
        return n_vectors * self.outputs[0].numel() * TRAFFIC if len(self) else 0

    def total(self) -> tuple[Tensor, ...]:
        """The sum over the examples, table-shaped."""
        ids, _, summed = self._merged
        return (self.outputs.new_zeros(self.shape).index_add_(0, ids, summed),)

    def squares(self) -> tuple[Tensor, ...]:
        """The sum over the examples of squared entries, table-shaped."""
        ids, _, summed = self._merged
        return (self.outputs.new_zeros(self.shape).index_add_(0, ids, summed.square()),)

    def multiplied(self, tables: tuple[Tensor, ...]) -> "Lookup":
        """Each example's gradient times one table, entry by entry; only the rows that were looked up are needed."""
        return replace(self, outputs=self.outputs * tables[0][self.ids.clamp_min(0)])

    def query_bytes(self, n_queries: int) -> int:
        """The bytes that one example takes while its block is multiplied with many others."""
        return 2 * self.outputs[0].numel() * self.outputs.element_size() if len(self) else 0

    def merged(self, other: Part) -> Part | None:
        """The sum of the gradients of two look-ups in one table: one longer look-up."""
        if not isinstance(other, Lookup):
            return None
        ids, outputs = torch.cat([self.ids, other.ids], 1), torch.cat([self.outputs, other.outputs], 1)
        return replace(self, ids=ids, outputs=outputs)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The table's shape."""
        return (self.shape,)

    def projected(self, sketches: Sequence[Sketch]) -> tuple[Part, ...]:
        """The projected gradients: outer products of the sketch's columns at the ids and the projected outputs."""
        sketch = sketches[0]
        if not isinstance(sketch, KroneckerSketch) or sketch.left is None:
            return DenseRows(self.dense()).projected(sketches)
        columns = sketch.left.to(self.outputs).T[self.ids.clamp_min(0)] * (self.ids >= 0)[..., None]
        inputs = sketch.on_right(self.outputs)
        return (OuterProducts(inputs, columns, (columns.shape[2], inputs.shape[2])),)

    def finite(self) -> Tensor:
        """[example]: whether every number is finite."""
        return self.outputs.isfinite().flatten(1).all(1)


def _pairs_for_a_product(device: torch.device) -> int:
    """From how many pairs on a product for a single id is faster than gathering them with those of all rare ids."""
    return workspace(device) // 2**12


def _common_runs(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    """[id, 4]: where the run of each of my ids begins and its length, and that of theirs; 0 if they lack the id."""
    (ids, my_start, my_counts), (their_ids, their_start, their_counts) = mine, theirs
    at = torch.searchsorted(their_ids, ids).clamp_max(len(their_ids) - 1)
    return torch.stack([my_start, my_counts, their_start[at], their_counts[at] * (their_ids[at] == ids)], 1)


def _pairs(runs: Tensor, ends: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Some of the pairs of positions within the two runs of each id; ``ends`` says where those of an id end."""
    pair = torch.arange(start, stop, device=ends.device)
    run = torch.searchsorted(ends, pair, right=True)
    my_start, my_count, their_start, their_count = runs[run].unbind(1)
    within = pair - ends[run] + my_count * their_count
    return my_start + within // their_count, their_start + within % their_count
