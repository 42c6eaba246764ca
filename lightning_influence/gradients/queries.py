"""Gradients of queries as methods use them: of each query, or of their mean as one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.gradients.block import Gradients, SketchOf, layer_of
from lightning_influence.gradients.part import one_row_per_example


class QueryGradients(ABC):
    """The query side of a score: multiplied with one block of training examples after another."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[query, example of block]: inner products; ``scale`` as in ``Gradients.dot``."""

    @abstractmethod
    def normalized(self, how: str) -> "QueryGradients":
        """At length one, whole (``"cosine"``) or within every layer (``"layerwise"``)."""

    @abstractmethod
    def project(self, sketch_of: SketchOf) -> "QueryGradients":
        """Under the sketches that the training examples' gradients are under."""

    @abstractmethod
    def dense(self) -> dict[str, Tensor]:
        """Written out by parameter name, [query, *shape]: queries x parameters of memory."""

    @abstractmethod
    def norm2(self) -> Tensor:
        """[query]: squared lengths."""

    @abstractmethod
    def times(self, vector: Mapping[str, Tensor]) -> Tensor:
        """[query]: inner product of each with one vector given by parameter name."""

    def diagonal(self, block: Gradients) -> Tensor:
        """[example]: of as many queries as the block has examples, each with the example of its own number."""
        return self.dot(block).diagonal()


class EachQuery(QueryGradients):
    """Gradients of every query, in the blocks they were computed in."""

    def __init__(self, blocks: Sequence[Gradients]) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return sum(len(queries) for queries in self._blocks)

    @property
    def blocks(self) -> Sequence[Gradients]:
        """The gradients, block by block."""
        return self._blocks

    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[query, example of block]."""
        products = [queries.dot(block, scale) for queries in self._blocks]
        return products[0] if len(products) == 1 else torch.cat(products)

    def normalized(self, how: str) -> "EachQuery":
        """At length one, each query for itself."""
        return EachQuery([queries.normalized(how) for queries in self._blocks])

    def project(self, sketch_of: SketchOf) -> "EachQuery":
        """Each query's sketch."""
        return EachQuery([queries.project(sketch_of) for queries in self._blocks])

    def dense(self) -> dict[str, Tensor]:
        """[query, *shape] by parameter name; zeros for a query whose loss does not reach it."""
        written = [queries.dense() for queries in self._blocks]
        shapes = {name: rows[0] for of_block in written for name, rows in of_block.items()}
        return {
            name: torch.cat(
                [
                    of_block[name] if name in of_block else like.new_zeros(len(queries), *like.shape)
                    for queries, of_block in zip(self._blocks, written, strict=True)
                ]
            )
            for name, like in shapes.items()
        }

    def norm2(self) -> Tensor:
        """[query]."""
        return torch.cat([queries.norm2() for queries in self._blocks])

    def times(self, vector: Mapping[str, Tensor]) -> Tensor:
        """[query]."""
        return torch.cat([queries.times(vector) for queries in self._blocks])


class DenseQueries(QueryGradients):
    """Vectors written out: solved directions, or the gradient of the queries' mean loss as the only one.

    Args:
        vectors: [query, *shape] by parameter name; a name that is absent stands for zeros.
        groups: the optimizer's parameter group by parameter name; absent means 0.
    """

    def __init__(self, vectors: Mapping[str, Tensor], groups: Mapping[str, int]) -> None:
        self._vectors = vectors
        self._groups = groups

    def __len__(self) -> int:
        return len(next(iter(self._vectors.values())))

    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[query, example of block]; each part contracts in the cheaper order."""
        by_group: dict[int, Tensor] = {}
        shared = scale is None or scale.ndim == 1
        if any(name not in self._vectors for names in block.parts for name in names):
            block = block.apart()
        for names, part in block.parts.items():
            if names[0] not in self._vectors:  # no query's loss reaches it
                continue
            group = 0 if shared else self._groups.get(names[0], 0)
            product = part.against(tuple(self._vectors[name] for name in names))
            by_group[group] = by_group[group] + product if group in by_group else product
        scaled = [
            product if scale is None else product * (scale if shared else scale[group]).to(product)
            for group, product in by_group.items()
        ]
        zeros = next(iter(self._vectors.values())).new_zeros
        return torch.stack(scaled).sum(0) if scaled else zeros(len(self), len(block))

    def normalized(self, how: str) -> "DenseQueries":
        """Each vector at length one."""
        squares: dict[str, Tensor] = {}
        for name, rows in self._vectors.items():
            layer = "" if how == "cosine" else layer_of((name,))
            squares[layer] = squares.get(layer, torch.zeros_like(_squared(rows))) + _squared(rows)
        factors = {layer: torch.where(total > 0, total, torch.inf).rsqrt() for layer, total in squares.items()}
        vectors = {
            name: rows * one_row_per_example(factors["" if how == "cosine" else layer_of((name,))], rows)
            for name, rows in self._vectors.items()
        }
        return DenseQueries(vectors, self._groups)

    def project(self, sketch_of: SketchOf) -> "DenseQueries":
        """Each vector's sketch."""
        sketched = {n: sketch_of(n, rows.shape[1:], rows).rows(rows) for n, rows in self._vectors.items()}
        return DenseQueries(sketched, self._groups)

    def dense(self) -> dict[str, Tensor]:
        """[query, *shape] by parameter name."""
        return dict(self._vectors)

    def norm2(self) -> Tensor:
        """[query]."""
        return torch.stack([_squared(rows) for rows in self._vectors.values()]).sum(0)

    def times(self, vector: Mapping[str, Tensor]) -> Tensor:
        """[query]."""
        products = [rows @ vector[n].flatten() for n, rows in _as_rows(self._vectors) if n in vector]
        return torch.stack(products).sum(0) if products else self.norm2() * 0


def _as_rows(vectors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """[query, entries] by name, for parameters that are one number too."""
    return [(name, rows.reshape(len(rows), -1)) for name, rows in vectors.items()]


def _squared(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1).square().sum(1)
