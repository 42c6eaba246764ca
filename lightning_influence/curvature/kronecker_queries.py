"""Queries multiplied by a Kronecker-factored inverse, and the rank that their scores need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.curvature.kronecker_part import KroneckerPart
from lightning_influence.devices import read_numbers
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import Names, SketchOf
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.queries import EachQuery, QueryGradients
from lightning_influence.numerics.kronecker import weighted_truncation

# A table with fewer entries is always used exactly.
_SMALL = 2**10
# The most queries on which the error of a low rank is measured.
_MEASURED = 32


class KroneckerQueries(QueryGradients):
    """An inverse times the gradients of queries: all queries in one part per factored layer, others in blocks.

    Args:
        joint: the parts of the factored layers.
        others: the parts of all other layers, one element per block of queries.
        lower_ranks: replaces parts of factored layers by low-rank ones, at the first ``dot``; None to keep them exact.
    """

    def __init__(
        self,
        joint: Gradients,
        others: Sequence[Gradients],
        lower_ranks: Callable[[Mapping[Names, Part]], Mapping[Names, Part]] | None = None,
    ) -> None:
        self.joint = joint
        self.others = EachQuery(others)
        self._has_others = any(block.parts for block in others)
        self._lower_ranks = lower_ranks

    def __len__(self) -> int:
        return len(self.joint)

    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[query, example of block]."""
        if self._lower_ranks is not None:
            parts = {**self.joint.parts, **self._lower_ranks(self.joint.parts)}
            self.joint, self._lower_ranks = Gradients(parts, self.joint.groups, len(self.joint)), None
        product = self.joint.dot(block, scale)
        return product + self.others.dot(block, scale) if self._has_others else product

    def normalized(self, how: str) -> QueryGradients:
        """Dense, normalised to length one."""
        return self._dense_queries().normalized(how)

    def project(self, sketch_of: SketchOf) -> QueryGradients:
        """Dense, with the sketches applied."""
        return self._dense_queries().project(sketch_of)

    def _dense_queries(self) -> EachQuery:
        groups: dict[Names, int] = {}
        for block in (self.joint, *self.others.blocks):
            groups |= {(name,): group for names, group in block.groups.items() for name in names}
        parts: dict[Names, Part] = {(name,): DenseRows((rows,)) for name, rows in self.dense().items()}
        return EachQuery([Gradients(parts, groups, len(self.joint))])

    def dense(self) -> dict[str, Tensor]:
        """[query, *shape] by parameter name."""
        return self.joint.dense() | (self.others.dense() if self._has_others else {})

    def norm2(self) -> Tensor:
        """[query]."""
        return self.joint.norm2() + self.others.norm2() if self._has_others else self.joint.norm2()

    def times(self, vector: Mapping[str, Tensor]) -> Tensor:
        """[query]."""
        product = self.joint.times(vector)
        return product + self.others.times(vector) if self._has_others else product


def lower_ranks(
    parts: Mapping[Names, KroneckerPart],
    weights: Mapping[Names, tuple[Tensor, Tensor]],
    sample: Gradients,
    tolerance: float,
) -> tuple[dict[Names, KroneckerPart], float]:
    """Lower the ranks of the inverse eigenvalues as far as the error of the scores allows.

    Args:
        parts: exact parts.
        weights: for each part, weights of the rows and columns of its table.
        sample: gradients of some training examples.
        tolerance: the largest relative error of the scores of some queries with the sample, in root mean square over
            queries.

    Returns:
        The parts (exact where a low rank would not be cheaper), and the error on the sampled pairs.
    """
    queries = len(next(iter(parts.values())))
    rows = slice(0, queries, max(1, -(-queries // _MEASURED)))
    tables = {
        names: _LowRankTable(part.slice(rows), weights[names], sample.parts.get(names), len(sample))
        for names, part in parts.items()
    }
    length = torch.stack([table.exact for table in tables.values()]).sum(0).norm(dim=1)
    length = torch.where(length > 0, length, torch.inf)

    def relative(errors: Tensor) -> Tensor:
        return (errors.norm(dim=1) / length).square().mean().sqrt()

    error = 0.0
    while any(table.low_rank is not None for table in tables.values()):
        errors = [table.errors for table in tables.values()]
        (error,), *own = read_numbers([relative(each) for each in (torch.stack(errors).sum(0), *errors)])
        if error <= tolerance:
            break
        # Raise the rank where the error is largest for the cost.
        shares = {n: e**2 / sum(t.part.inverse.table.shape) for (n, t), (e,) in zip(tables.items(), own, strict=True)}
        tables[max(shares, key=lambda names: shares[names])].raise_rank()
        error = 0.0
    found = {names: replace(part, low_rank=tables[names].low_rank) for names, part in parts.items()}
    return found, error


class _LowRankTable:
    """The inverse eigenvalues of one layer at a low rank, and the error of some scores with it.

    The rank starts at two; a rank whose products would cost as much as the full table is replaced by the table.
    """

    def __init__(self, part: KroneckerPart, weights: tuple[Tensor, Tensor], sample: Part | None, examples: int) -> None:
        self.part = part
        self.sample = sample
        self.exact = self._dot(part, examples)
        self.errors = torch.zeros_like(self.exact)
        self.low_rank: tuple[Tensor, Tensor] | None = None
        k, l = part.inverse.table.shape  # noqa: E741
        self.max_rank = min(k, l, int(0.7 * k * l / (k + l))) if k * l >= _SMALL else 0
        self._truncated = weighted_truncation(part.inverse.table, *weights) if self.max_rank > 1 else None
        if self._truncated is not None:
            self.errors = -self.exact
            self.raise_rank()

    def raise_rank(self) -> None:
        """Raise the rank by two, or switch to the full table."""
        rank = 0 if self.low_rank is None else len(self.low_rank[0])
        if self._truncated is None or rank + 2 > self.max_rank:
            self.low_rank, self.errors = None, torch.zeros_like(self.exact)
            return
        self.low_rank = self._truncated(rank + 2)
        new = (self.low_rank[0][rank:], self.low_rank[1][rank:])
        self.errors = self.errors + self._dot(replace(self.part, low_rank=new), self.exact.shape[1])

    def _dot(self, part: KroneckerPart, examples: int) -> Tensor:
        out = part.outputs.new_zeros(len(part), examples)
        if self.sample is not None:
            part.accumulate_dot(self.sample, out)
        return out
