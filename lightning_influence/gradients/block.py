"""A block of per-sample gradients, which methods use instead of a matrix of examples × parameters."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.gradients.part import Part
from lightning_influence.numerics.projections import Sketch

Names = tuple[str, ...]
"""The names of the parameters of one part: a parameter, or a weight and its bias."""

SketchOf = Callable[[str, Sequence[int], Tensor], Sketch]
"""``sketch_of(name, shape, like)``: the sketch of a parameter, in the dtype and on the device of ``like``."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """Per-sample gradients of a block of examples, never built as one matrix.

    Args:
        parts: for each parameter (or weight and bias together), the gradients in factored or dense form.
        groups: the optimizer's parameter group of each part; 0 where it is missing.
        size: the number of examples.
    """

    parts: Mapping[Names, Part]
    groups: Mapping[Names, int]
    size: int

    def __len__(self) -> int:
        return self.size

    def dot(self, other: "Gradients", scale: Tensor | None = None) -> Tensor:
        """Inner products of each gradient of this block with each gradient of another.

        Args:
            other: gradients of the same parameters.
            scale: a factor for each column, [example of other], or for each parameter group and column, [group,
                example of other] (such as learning rates).

        Returns:
            [example of self, example of other].
        """
        if not aligned(self.parts, other.parts):
            return self.per_parameter().dot(other.per_parameter(), scale)
        by_group: dict[int, Tensor] = {}
        shared = scale is None or scale.ndim == 1
        for names, part in self.parts.items():
            group = 0 if shared else self.groups.get(names, 0)
            if group not in by_group:
                by_group[group] = self._zeros(len(self), len(other))
            if names in other.parts:  # a parameter on which no loss of a block depends has no part in it
                _accumulate(part, other.parts[names], by_group[group])
        for group, product in by_group.items():
            if scale is not None:
                product.mul_((scale if shared else scale[group]).to(product))
        products = list(by_group.values()) or [self._zeros(len(self), len(other))]
        for product in products[1:]:
            products[0].add_(product)
        return products[0]

    def own_dot(self, other: "Gradients", entries: Mapping[str, Tensor] | None = None) -> Tensor:
        """Inner products of each gradient of this block with the one of the same index of another, [example].

        Args:
            other: gradients of the same parameters, of as many examples.
            entries: a factor for every entry of a parameter, [*shape] by name; None: 1.
        """
        if not aligned(self.parts, other.parts):
            return self.per_parameter().own_dot(other.per_parameter(), entries)
        total = self._zeros(len(self))
        for names, part in self.parts.items():
            if names in other.parts:
                factors = None if entries is None else tuple(entries[name] for name in names)
                total += part.own_dot(other.parts[names], factors)
        return total

    def total(self) -> dict[str, Tensor]:
        """The sum of the gradients over the examples, [*shape] by parameter name."""
        return {
            name: value for names, part in self.parts.items() for name, value in zip(names, part.total(), strict=True)
        }

    def norm2(self, scale: Tensor | None = None) -> Tensor:
        """[example]: the squared norm of each gradient, with ``scale`` as in ``dot`` (as for self-influence)."""
        total = self._zeros(len(self))
        for names, part in self.parts.items():
            norms = part.norm2()
            factor = scale if scale is None or scale.ndim == 1 else scale[self.groups.get(names, 0)]
            total += norms if factor is None else norms * factor.to(norms)
        return total

    def times(self, vector: Mapping[str, Tensor]) -> Tensor:
        """[example]: the inner product of each gradient with one vector, [*shape] by parameter name."""
        total = self._zeros(len(self))
        for names, part in self.parts.items():
            total += part.times(tuple(vector[name] for name in names))
        return total

    def project(self, sketch_of: SketchOf) -> "Gradients":
        """The projected gradients, with one sketch per parameter; call ``dense`` on them to store them."""
        parts: dict[Names, Part] = {}
        for names, part in self.parts.items():
            sketches = [sketch_of(name, shape, part.like) for name, shape in zip(names, part.shapes(), strict=True)]
            parts.update({(n,): one for n, one in zip(names, part.projected(sketches), strict=True)})
        return Gradients(parts, self._groups_per_parameter(), self.size)

    def dense(self) -> dict[str, Tensor]:
        """The gradients as dense tensors, [example, *shape] by parameter name, of examples × parameters numbers."""
        return {
            name: rows for names, part in self.parts.items() for name, rows in zip(names, part.dense(), strict=True)
        }

    def normalized(self, how: str) -> "Gradients":
        """Normalise each gradient to length one, as a whole (``"cosine"``) or per layer (``"layerwise"``).

        A gradient of zero stays zero.
        """
        if how == "cosine":
            factor = inverse_length(self.norm2())
            return self.scaled(dict.fromkeys(self.parts, factor))
        norms: dict[str, Tensor] = {}
        for names, part in self.parts.items():
            layer = layer_of(names)
            norms[layer] = norms[layer] + part.norm2() if layer in norms else part.norm2()
        return self.scaled({names: inverse_length(norms[layer_of(names)]) for names in self.parts})

    def scaled(self, factors: Mapping[Names, Tensor]) -> "Gradients":
        """Multiply the gradients of each part by one factor per example, ``factors`` [example] by part."""
        parts = {names: part.scaled(factors[names]) for names, part in self.parts.items()}
        return Gradients(parts, self.groups, self.size)

    def only(self, names: Collection[str]) -> "Gradients":
        """The gradients of some parameters."""
        wanted, found = set(names), self
        if any(0 < len(wanted & set(key)) < len(key) for key in self.parts):
            found = self.per_parameter()
        return Gradients({k: p for k, p in found.parts.items() if set(k) <= wanted}, found.groups, self.size)

    def per_parameter(self) -> "Gradients":
        """The same gradients with one part per parameter."""
        parts: dict[Names, Part] = {}
        for names, part in self.parts.items():
            parts.update({(name,): one for name, one in zip(names, part.per_parameter(), strict=True)})
        return Gradients(parts, self._groups_per_parameter(), self.size)

    def _groups_per_parameter(self) -> dict[Names, int]:
        return {(name,): group for names, group in self.groups.items() for name in names}

    def slice(self, rows: slice) -> "Gradients":
        """Some of the examples."""
        size = len(range(*rows.indices(self.size)))
        return Gradients({names: part.slice(rows) for names, part in self.parts.items()}, self.groups, size)

    def query_bytes(self, n_queries: int) -> int:
        """The bytes that one example takes while its block is multiplied with many others, as queries are."""
        return sum(part.query_bytes(n_queries) for part in self.parts.values())

    def not_finite(self) -> dict[int, str]:
        """The row of each example whose gradient holds NaN or infinity, with the first parameter where it does."""
        rows: dict[int, str] = {}
        for names, part in self.parts.items():
            for row in (~part.finite()).nonzero()[:, 0].tolist():
                rows.setdefault(row, names[0])
        return rows

    def _zeros(self, *shape: int) -> Tensor:
        """Zeros of the widest type among the parts: a module may have weights of several."""
        found: Tensor | None = None
        for part in self.parts.values():
            if found is None or found.dtype != torch.promote_types(found.dtype, part.like.dtype):
                found = part.like
        return torch.zeros(shape) if found is None else found.new_zeros(shape)


def aligned(mine: Mapping[Names, Any], theirs: Mapping[Names, Any]) -> bool:
    """Whether two blocks group their common parameters into the same parts."""
    if mine.keys() == theirs.keys():
        return True
    others = {name for names in mine.keys() - theirs.keys() for name in names}
    return not any(name in others for names in theirs.keys() - mine.keys() for name in names)


def _accumulate(part: Part, other: Part, out: Tensor) -> None:
    """``out += `` the inner products of two parts, computed in their own type."""
    if part.like.dtype == out.dtype:
        part.accumulate_dot(other, out)
    else:
        own = out.new_zeros(out.shape, dtype=part.like.dtype)
        part.accumulate_dot(other, own)
        out.add_(own)


def layer_of(names: Names) -> str:
    """The module that a part's parameters belong to."""
    return names[0].rpartition(".")[0]


def inverse_length(norm2: Tensor) -> Tensor:
    """[example]: 1 / length for each squared length; zero for zero."""
    return torch.where(norm2 > 0, norm2, torch.inf).rsqrt()
