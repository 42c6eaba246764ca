"""A block of per-sample gradients: what methods see instead of a matrix of examples × parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.gradients.part import Part
from lightning_influence.numerics.projections import Sketch

Names = tuple[str, ...]
"""The parameters of one part: a weight, or a weight with its bias."""

SketchOf = Callable[[str, Sequence[int], Tensor], Sketch]
"""Gives the sketch of a parameter by its name and shape, for gradients like the tensor."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """Per-sample gradients of some examples, one part a parameter (or weight and bias).

    Args:
        parts: the factors or rows by parameter names.
        groups: the optimizer's parameter group of each part; absent means 0.
        size: number of examples.
    """

    parts: Mapping[Names, Part]
    groups: Mapping[Names, int]
    size: int

    def __len__(self) -> int:
        return self.size

    def dot(self, other: "Gradients", scale: Tensor | None = None) -> Tensor:
        """Inner products of every gradient here with every gradient there.

        Args:
            other: gradients of the same parameters.
            scale: multiplies the columns, [example of other], or [group, example of other] where the parameter
                groups differ (learning rates).

        Returns:
            [example of self, example of other].
        """
        if not self._aligned(other):
            return self.apart().dot(other.apart(), scale)
        by_group: dict[int, Tensor] = {}
        shared = scale is None or scale.ndim == 1
        for names, part in self.parts.items():
            group = 0 if shared else self.groups.get(names, 0)
            if group not in by_group:
                by_group[group] = self._zeros(len(self), len(other))
            if names in other.parts:  # a parameter that an example's loss does not reach has no part there
                part.accumulate_dot(other.parts[names], by_group[group])
        for group, product in by_group.items():
            if scale is not None:
                product.mul_((scale if shared else scale[group]).to(product))
        products = list(by_group.values()) or [self._zeros(len(self), len(other))]
        for product in products[1:]:
            products[0].add_(product)
        return products[0]

    def total(self) -> dict[str, Tensor]:
        """The sum of the gradients by parameter name."""
        return {
            name: value for names, part in self.parts.items() for name, value in zip(names, part.total(), strict=True)
        }

    def norm2(self, scale: Tensor | None = None) -> Tensor:
        """[example]: squared lengths, weighted as ``dot`` is (self-influence)."""
        total = self._zeros(len(self))
        for names, part in self.parts.items():
            norms = part.norm2()
            factor = scale if scale is None or scale.ndim == 1 else scale[self.groups.get(names, 0)]
            total += norms if factor is None else norms * factor.to(norms)
        return total

    def times(self, vector: Mapping[str, Tensor]) -> Tensor:
        """[example]: inner product of each gradient with one vector given by parameter name."""
        total = self._zeros(len(self))
        for names, part in self.parts.items():
            total += part.times(tuple(vector[name] for name in names))
        return total

    def project(self, sketch_of: SketchOf) -> "Gradients":
        """The gradients under a sketch for each parameter; ``dense`` of it is what there is to store."""
        parts: dict[Names, Part] = {}
        for names, part in self.parts.items():
            sketches = [sketch_of(name, shape, part.like) for name, shape in zip(names, part.shapes(), strict=True)]
            parts.update({(n,): one for n, one in zip(names, part.projected(sketches), strict=True)})
        return Gradients(parts, self._groups_apart(), self.size)

    def dense(self) -> dict[str, Tensor]:
        """The gradients written out by parameter name, [example, *shape]: examples × parameters of memory."""
        return {
            name: rows for names, part in self.parts.items() for name, rows in zip(names, part.dense(), strict=True)
        }

    def normalized(self, how: str) -> "Gradients":
        """Each gradient at length one: whole (``"cosine"``) or within every layer (``"layerwise"``).

        A gradient that is zero stays zero.
        """
        if how == "cosine":
            factor = _inverse_length(self.norm2())
            return self.scaled(dict.fromkeys(self.parts, factor))
        norms: dict[str, Tensor] = {}
        for names, part in self.parts.items():
            layer = layer_of(names)
            norms[layer] = norms[layer] + part.norm2() if layer in norms else part.norm2()
        return self.scaled({names: _inverse_length(norms[layer_of(names)]) for names in self.parts})

    def scaled(self, factors: Mapping[Names, Tensor]) -> "Gradients":
        """Each example's part times its own number, ``factors`` [example] by part."""
        parts = {names: part.scaled(factors[names]) for names, part in self.parts.items()}
        return Gradients(parts, self.groups, self.size)

    def apart(self) -> "Gradients":
        """The same with a part of its own for every parameter."""
        parts: dict[Names, Part] = {}
        for names, part in self.parts.items():
            parts.update({(name,): one for name, one in zip(names, part.each(), strict=True)})
        return Gradients(parts, self._groups_apart(), self.size)

    def _groups_apart(self) -> dict[Names, int]:
        return {(name,): group for names, group in self.groups.items() for name in names}

    def _aligned(self, other: "Gradients") -> bool:
        """Whether no parameter shares a part on one side only."""
        if self.parts.keys() == other.parts.keys():
            return True
        mine = {name for names in self.parts.keys() - other.parts.keys() for name in names}
        return not any(name in mine for names in other.parts.keys() - self.parts.keys() for name in names)

    def slice(self, rows: slice) -> "Gradients":
        """Some of the examples."""
        size = len(range(*rows.indices(self.size)))
        return Gradients({names: part.slice(rows) for names, part in self.parts.items()}, self.groups, size)

    def query_bytes(self, n_queries: int) -> int:
        """Bytes that one example takes when its block is multiplied with many others."""
        return sum(part.query_bytes(n_queries) for part in self.parts.values())

    def not_finite(self) -> dict[int, str]:
        """Row of each example whose gradient holds NaN or infinity, with the first parameter it shows in."""
        rows: dict[int, str] = {}
        for names, part in self.parts.items():
            for row in (~part.finite()).nonzero()[:, 0].tolist():
                rows.setdefault(row, names[0])
        return rows

    def _zeros(self, *shape: int) -> Tensor:
        for part in self.parts.values():
            return part.like.new_zeros(shape)
        return torch.zeros(shape)


def layer_of(names: Names) -> str:
    """The module that a part's parameters belong to."""
    return names[0].rpartition(".")[0]


def _inverse_length(norm2: Tensor) -> Tensor:
    return torch.where(norm2 > 0, norm2, torch.inf).rsqrt()
