"""Gradients of queries as methods use them: of each query, or of their mean as one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.gradients.block import Gradients, layer_of


class QueryGradients(ABC):
    """The query side of a score: multiplied with one block of training examples after another."""

    @abstractmethod
    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[query, example of block]: inner products; ``scale`` as in ``Gradients.dot``."""

    @abstractmethod
    def normalized(self, how: str) -> "QueryGradients":
        """At length one, whole (``"cosine"``) or within every layer (``"layerwise"``)."""


class EachQuery(QueryGradients):
    """Gradients of every query, in the blocks they were computed in."""

    def __init__(self, blocks: Sequence[Gradients]) -> None:
        self._blocks = blocks

    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[query, example of block]."""
        products = [queries.dot(block, scale) for queries in self._blocks]
        return products[0] if len(products) == 1 else torch.cat(products)

    def normalized(self, how: str) -> "EachQuery":
        """At length one, each query for itself."""
        return EachQuery([queries.normalized(how) for queries in self._blocks])


class MeanQuery(QueryGradients):
    """The gradient of the queries' mean loss: one vector, whatever their number."""

    def __init__(self, vector: Mapping[str, Tensor], groups: Mapping[str, int]) -> None:
        self._vector = vector
        self._groups = groups

    def dot(self, block: Gradients, scale: Tensor | None = None) -> Tensor:
        """[1, example of block]."""
        by_group: dict[int, Tensor] = {}
        shared = scale is None or scale.ndim == 1
        if any(name not in self._vector for names in block.parts for name in names):
            block = block.apart()
        for names, part in block.parts.items():
            if names[0] not in self._vector:  # no query's loss reaches it
                continue
            group = 0 if shared else self._groups.get(names[0], 0)
            product = part.times(tuple(self._vector[name] for name in names))
            by_group[group] = by_group[group] + product if group in by_group else product
        scaled = [
            product if scale is None else product * (scale if shared else scale[group]).to(product)
            for group, product in by_group.items()
        ]
        return (
            torch.stack(scaled).sum(0)[None] if scaled else next(iter(self._vector.values())).new_zeros(1, len(block))
        )

    def normalized(self, how: str) -> "MeanQuery":
        """The mean gradient at length one."""
        squares: dict[str, Tensor] = {}
        for name, value in self._vector.items():
            layer = "" if how == "cosine" else layer_of((name,))
            squares[layer] = squares.get(layer, torch.zeros_like(value.sum())) + value.square().sum()
        factors = {layer: torch.where(total > 0, total, torch.inf).rsqrt() for layer, total in squares.items()}
        vector = {n: v * factors["" if how == "cosine" else layer_of((n,))] for n, v in self._vector.items()}
        return MeanQuery(vector, self._groups)
