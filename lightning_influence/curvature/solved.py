"""Queries behind a Kronecker-factored inverse, and how few products their scores need."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.curvature.factors import Names
from lightning_influence.curvature.kronecker_part import KroneckerPart, with_own
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.block import SketchOf
from lightning_influence.gradients.queries import EachQuery, QueryGradients
from lightning_influence.gradients.rows import Rows
from lightning_influence.numerics.kronecker import products

# Queries on which the error of the scores is measured.
_MEASURED = 32
_RANKS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)


class Solved(QueryGradients):
    """Directions of queries: those of Kronecker-factored layers for all queries at once, others block by block."""

    def __init__(self, joint: Gradients, others: Sequence[Gradients]) -> None:
        self.joint = joint
        self.others = EachQuery(others)

    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[query, example of block]."""
        product = self.joint.dot(block, scale)
        return product + self.others.dot(block, scale) if self._has_others else product

    @property
    def _has_others(self) -> bool:
        return any(block.parts for block in self.others.blocks)

    def normalized(self, how: str) -> QueryGradients:
        """At length one, whole (layers stand apart in this form, and are written out)."""
        written = Gradients({(n,): Rows((r,)) for n, r in self.dense().items()}, self._groups(), len(self.joint))
        return EachQuery([written.normalized(how)])

    def project(self, sketch_of: SketchOf) -> QueryGradients:
        """Written out, under the sketches."""
        written = Gradients({(n,): Rows((r,)) for n, r in self.dense().items()}, self._groups(), len(self.joint))
        return EachQuery([written]).project(sketch_of)

    def _groups(self) -> dict[Names, int]:
        found: dict[Names, int] = {}
        for block in (self.joint, *self.others.blocks):
            found |= {(name,): group for names, group in block.groups.items() for name in names}
        return found

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

    def diagonal(self, block: Gradients) -> Tensor:
        """[example]: exactly, whatever ``tolerance``."""
        total = self.joint._zeros(len(block))
        start = 0
        for others in self.others.blocks:
            rows = slice(start, start + len(others))
            for names, part in others.parts.items():
                if names in block.parts:
                    total[rows] += with_own(part, block.parts[names].slice(rows))
            start += len(others)
        for names, part in self.joint.parts.items():
            if names in block.parts:
                other = block.parts[names]
                total += part.with_own(other) if isinstance(part, KroneckerPart) else with_own(part, other)
        return total


def shortened(
    parts: Mapping[Names, KroneckerPart],
    weights: Mapping[Names, tuple[Tensor, Tensor]],
    sample: Gradients,
    tolerance: float,
) -> tuple[dict[Names, KroneckerPart], float]:
    """The parts with tables of as few outer products as keep the scores within the tolerance, and the error.

    Args:
        parts: exact ones.
        weights: by part, what the two sides of its table weigh.
        sample: gradients of some training examples.
        tolerance: of the scores of some queries with the sample, relative to each query's own in the mean square.

    Returns:
        Parts that stay exact where that is no more work, and the error measured on the sampled pairs.
    """
    queries = len(next(iter(parts.values())))
    picked = torch.arange(0, queries, max(1, -(-queries // _MEASURED)))
    some = {names: _picked(part, picked) for names, part in parts.items()}
    exact = {names: _dot(part, sample, names) for names, part in some.items()}
    whole = torch.stack(list(exact.values())).sum(0)
    length = whole.norm(dim=1)
    length = torch.where(length > 0, length, torch.inf)
    found, missed = dict(parts), torch.zeros_like(whole)
    for names, part in some.items():
        k, l = part.inverse.table.shape  # noqa: E741
        truncated = products(part.inverse.table, *weights[names])
        for rank in _RANKS:
            if rank > min(k, l) or rank * (k + l) >= 0.7 * k * l:
                break
            terms = truncated(rank)
            error = _dot(replace(part, terms=terms), sample, names) - exact[names]
            if float((error.norm(dim=1) / length).square().mean().sqrt()) <= tolerance / len(some) ** 0.5:
                found[names] = replace(parts[names], terms=terms)
                missed += error
                break
    return found, float((missed.norm(dim=1) / length).square().mean().sqrt())


def _picked(part: KroneckerPart, rows: Tensor) -> KroneckerPart:
    return replace(part, inputs=part.inputs[rows], outputs=part.outputs[rows])


def _dot(part: KroneckerPart, sample: Gradients, names: Names) -> Tensor:
    out = part.outputs.new_zeros(len(part), len(sample))
    if names in sample.parts:
        part.accumulate_dot(sample.parts[names], out)
    return out
