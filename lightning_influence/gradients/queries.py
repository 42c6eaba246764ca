"""Gradients of queries: one per query, or dense vectors such as solutions and the gradient of a mean."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.gradients.block import Gradients, SketchOf, inverse_length, layer_of
from lightning_influence.gradients.engine import Engine
from lightning_influence.gradients.guard import Again
from lightning_influence.gradients.part import one_row_per_example


class QueryGradients(ABC):
    """The gradients of queries, to be multiplied with one block of training gradients after another."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[query, example of block]: inner products, with ``scale`` as in ``Gradients.dot``."""

    @abstractmethod
    def normalized(self, how: str) -> "QueryGradients":
        """Normalise each to length one, as a whole (``"cosine"``) or per layer (``"layerwise"``)."""

    @abstractmethod
    def project(self, sketch_of: SketchOf) -> "QueryGradients":
        """The projected gradients, with the sketches that the training gradients have too."""

    @abstractmethod
    def dense(self) -> dict[str, Tensor]:
        """Dense gradients, [query, *shape] by parameter name; takes queries x parameters of memory."""

    @abstractmethod
    def norm2(self) -> Tensor:
        """[query]: squared norms."""

    @abstractmethod
    def times(self, vector: Mapping[str, Tensor]) -> Tensor:
        """[query]: the inner product of each gradient with one vector, [*shape] by parameter name."""

    def diagonal(self, block: Gradients) -> Tensor:
        """[example]: the inner product of each query with the example of the same index; there are as many of both."""
        vectors = self.dense()
        if any(name not in vectors for names in block.parts for name in names):
            block = block.per_parameter()
        total = block._zeros(len(block))
        for names, part in block.parts.items():
            if names[0] in vectors:  # otherwise no query's loss depends on it
                total += part.times_own(tuple(vectors[name] for name in names))
        return total


@dataclass(frozen=True, eq=False)
class EachQuery(QueryGradients):
    """Gradients of every query.

    Args:
        blocks: the gradients, in the blocks in which they were computed.
    """

    blocks: Sequence[Gradients]

    def __len__(self) -> int:
        return sum(len(queries) for queries in self.blocks)

    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[query, example of block]."""
        products = [queries.dot(block, scale) for queries in self.blocks]
        return products[0] if len(products) == 1 else torch.cat(products)

    def normalized(self, how: str) -> "EachQuery":
        """Normalise each query's gradient."""
        return EachQuery([queries.normalized(how) for queries in self.blocks])

    def project(self, sketch_of: SketchOf) -> "EachQuery":
        """Project each query's gradient."""
        return EachQuery([queries.project(sketch_of) for queries in self.blocks])

    def dense(self) -> dict[str, Tensor]:
        """[query, *shape] by parameter name; zeros for queries whose losses do not depend on the parameter."""
        written = [queries.dense() for queries in self.blocks]
        shapes = {name: rows[0] for of_block in written for name, rows in of_block.items()}
        return {
            name: torch.cat(
                [
                    of_block[name] if name in of_block else like.new_zeros(len(queries), *like.shape)
                    for queries, of_block in zip(self.blocks, written, strict=True)
                ]
            )
            for name, like in shapes.items()
        }

    def norm2(self) -> Tensor:
        """[query]."""
        return torch.cat([queries.norm2() for queries in self.blocks])

    def times(self, vector: Mapping[str, Tensor]) -> Tensor:
        """[query]."""
        return torch.cat([queries.times(vector) for queries in self.blocks])


@dataclass(frozen=True, eq=False)
class DenseQueries(QueryGradients):
    """Dense vectors in place of gradients: solutions with a curvature, or the gradient of the mean loss of all queries.

    Args:
        vectors: [query, *shape] by parameter name; zeros for a name that is missing.
        groups: the optimizer's parameter group by parameter name; 0 where it is missing.
    """

    vectors: Mapping[str, Tensor]
    groups: Mapping[str, int]

    def __len__(self) -> int:
        return len(next(iter(self.vectors.values())))

    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[query, example of block]; each part is multiplied in the cheaper order."""
        by_group: dict[int, Tensor] = {}
        shared = scale is None or scale.ndim == 1
        if any(name not in self.vectors for names in block.parts for name in names):
            block = block.per_parameter()
        for names, part in block.parts.items():
            if names[0] not in self.vectors:  # no query's loss depends on it
                continue
            group = 0 if shared else self.groups.get(names[0], 0)
            product = part.times_each(tuple(self.vectors[name] for name in names))
            by_group[group] = by_group[group] + product if group in by_group else product
        scaled = [
            product if scale is None else product * (scale if shared else scale[group]).to(product)
            for group, product in by_group.items()
        ]
        zeros = next(iter(self.vectors.values())).new_zeros
        return torch.stack(scaled).sum(0) if scaled else zeros(len(self), len(block))

    def normalized(self, how: str) -> "DenseQueries":
        """Normalise each vector."""
        layers = {name: "" if how == "cosine" else layer_of((name,)) for name in self.vectors}
        squares: dict[str, Tensor] = {}
        for name, rows in self.vectors.items():
            squares[layers[name]] = squares.get(layers[name], 0) + _squared(rows)
        factors = {name: inverse_length(squares[layer]) for name, layer in layers.items()}
        vectors = {name: rows * one_row_per_example(factors[name], rows) for name, rows in self.vectors.items()}
        return DenseQueries(vectors, self.groups)

    def slice(self, rows: slice) -> "DenseQueries":
        """Some of the vectors."""
        return DenseQueries({name: vectors[rows] for name, vectors in self.vectors.items()}, self.groups)

    def project(self, sketch_of: SketchOf) -> "DenseQueries":
        """Project each vector."""
        sketched = {n: sketch_of(n, rows.shape[1:], rows).rows(rows) for n, rows in self.vectors.items()}
        return DenseQueries(sketched, self.groups)

    def dense(self) -> dict[str, Tensor]:
        """[query, *shape] by parameter name."""
        return dict(self.vectors)

    def norm2(self) -> Tensor:
        """[query]."""
        return torch.stack([_squared(rows) for rows in self.vectors.values()]).sum(0)

    def times(self, vector: Mapping[str, Tensor]) -> Tensor:
        """[query]."""
        products = [
            rows.reshape(len(rows), -1) @ vector[n].flatten() for n, rows in self.vectors.items() if n in vector
        ]
        return torch.stack(products).sum(0) if products else self.norm2() * 0


def _squared(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1).square().sum(1)


def own_gradients(engine: Engine, block: Block, again: Again | None = None) -> Gradients:
    """The gradients of a block of queries, as by the engine; NaN for one without any tokens whose loss is NaN.

    As a training example, it has a weight of zero, so that its gradient does not matter.
    """
    found, weights = engine.gradients(block, again=again), engine.weights_of(block.ids)
    if weights is None or not bool((weights == 0).any()):
        return found
    defined = [w != 0 or engine.has_loss(block, i) for w, i in zip(weights.tolist(), block.ids, strict=True)]
    return found.scaled(dict.fromkeys(found.parts, torch.where(torch.tensor(defined), 1.0, torch.nan)))
