"""The inverses of all layers of an EK-FAC curvature, applied to the gradients of queries."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.curvature.curvature import PreparedCurvature
from lightning_influence.curvature.factors import rows_of
from lightning_influence.curvature.kronecker_part import KroneckerInverse, KroneckerPart
from lightning_influence.devices import read_ends, wide
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.directions import Directions
from lightning_influence.gradients.lookup import Lookup
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part
from lightning_influence.setting.setting import Setting


class LayerInverses:
    """The inverses of all layers, from what was prepared and a diagonal."""

    def __init__(self, prepared: PreparedCurvature, setting: Setting, diagonal: Tensor) -> None:
        self.shapes = {name: tuple(p.shape) for name, p in setting.engine.task.named_parameters().items()}
        self.inverses: dict[Names, KroneckerInverse] = {}
        self.diagonals: dict[Names, tuple[Tensor, ...]] = {}
        ends = setting.state("ends of tables", _Ends).of(prepared)
        for names, tensors in by_layer(prepared).items():
            added = float(diagonal[setting.engine.groups.get(names[0], 0)])
            inverted = tuple(
                _inverted(tensors[key], ends["|".join(names), key], added, names) for key in _tables(tensors)
            )
            if "eigenvalues" in tensors:
                self.inverses[names] = self._inverse(names, tensors, inverted[0], added)
            else:
                self.diagonals[names] = inverted

    def __iter__(self) -> Iterator[Names]:
        return iter((*self.inverses, *self.diagonals))

    def _inverse(self, names: Names, tensors: Mapping[str, Tensor], table: Tensor, added: float) -> KroneckerInverse:
        shapes = tuple(self.shapes[name] for name in names)
        bases = tensors["basis_out"], tensors["basis_in"]
        outside = 1 / added if added > 0 else torch.inf
        found = KroneckerInverse(*bases, bool(tensors["transposed"]), table, outside, shapes)
        if not added > 0 and not found.complete:
            _refuse_singular(names, added)
        return found

    def completed(self) -> "LayerInverses":
        """The same with complete bases, where few directions are missing."""
        self.inverses = {names: inverse.completed() for names, inverse in self.inverses.items()}
        return self

    def solve(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverses of all layers times dense vectors, [vector, *shape] by name."""
        solved: dict[str, Tensor] = {}
        for names in self:
            if rows := rows_of(names, vectors, self.shapes):
                solved |= zip(names, self._solve_layer(names, rows), strict=True)
        return solved

    def _solve_layer(self, names: Names, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if names in self.inverses:
            return self.inverses[names].solve(rows)
        return tuple(r * t for r, t in zip(rows, self.diagonals[names], strict=True))

    def solve_blocks(self, names: Names, parts: list[Part | None], sizes: list[int]) -> Part | None:
        """The inverse of one layer times the gradients of all blocks of queries, as one part."""
        inverse = self.inverses[names]
        present = [part for part in parts if part is not None]
        if not present:
            return None
        single = [p for p in present if isinstance(p, OuterProducts) and p.outputs.shape[1] == 1]
        if len(single) == len(parts):
            gradients = _concatenated(single)
            return KroneckerPart(inverse, gradients, *inverse.rotated(gradients))
        rows = []
        for part, size in zip(parts, sizes, strict=True):
            zeros = [present[0].like.new_zeros(size, *shape) for shape in inverse.shapes]
            rows.append(zeros if part is None else inverse.solve(part.dense()))
        return Directions(tuple(torch.cat(of_one) for of_one in zip(*rows, strict=True)))

    def solve_diagonal(self, names: Names, part: Part) -> Part:
        """The inverse of a layer with a diagonal Fisher times a block's gradients."""
        if isinstance(part, Lookup):
            return part.multiplied(self.diagonals[names])
        return Directions(self._solve_layer(names, part.dense()))


def by_layer(prepared: PreparedCurvature) -> dict[Names, dict[str, Tensor]]:
    """The prepared tensors grouped by layer."""
    kept: dict[Names, dict[str, Tensor]] = {}
    for key, tensor in prepared.tensors.items():
        joined, _, what = key.rpartition("/")
        kept.setdefault(tuple(joined.split("|")), {})[what] = tensor
    return kept


def _concatenated(parts: list[OuterProducts]) -> OuterProducts:
    if len(parts) == 1:
        return parts[0]
    inputs, outputs = (torch.cat([getattr(p, name) for p in parts]) for name in ("inputs", "outputs"))
    factors = None
    if any(p.factor is not None for p in parts):
        factors = torch.cat([outputs.new_ones(len(p)) if p.factor is None else p.factor for p in parts])
    return OuterProducts(inputs, outputs, parts[0].shape, parts[0].bias, parts[0].transposed, None, factors)


@dataclass
class _Ends:
    """The smallest and the largest entry of each table of the latest prepared curvature, read together."""

    prepared: PreparedCurvature | None = None
    found: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def of(self, prepared: PreparedCurvature) -> dict[tuple[str, str], list[float]]:
        """By layer and name of the table."""
        if self.prepared is not prepared:
            layers = by_layer(prepared)
            tables = {("|".join(n), key): tensors[key] for n, tensors in layers.items() for key in _tables(tensors)}
            self.prepared, self.found = prepared, dict(zip(tables, read_ends([*tables.values()]), strict=True))
        return self.found


def _tables(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of a layer's eigenvalues, or of the diagonals of its parameters."""
    return ["eigenvalues"] if "eigenvalues" in tensors else [f"diagonal{i}" for i in range(len(tensors))]


def _inverted(eigenvalues: Tensor, ends: Sequence[float], added: float, names: Names) -> Tensor:
    if not all(map(math.isfinite, ends)):
        raise ValueError(
            f"Expected finite gradients, got NaN or infinity in the Fisher of {', '.join(f'`{n}`' for n in names)}. "
            "`GradientDot()` names the training examples at fault: check their inputs and losses, or leave them out."
        )
    least, most = (end + added for end in ends)
    if eigenvalues.numel() and not least > torch.finfo(eigenvalues.dtype).eps * most * (added <= 0):
        _refuse_singular(names, added)
    return (1 / (wide(eigenvalues) + added)).to(eigenvalues)


def _refuse_singular(names: Names, added: float) -> None:
    raise ValueError(
        f"Expected `damping` to be positive where the Fisher of {', '.join(f'`{n}`' for n in names)} is singular, got "
        f"{added:g} including the weight decay. Pass a positive `damping`, or None for the default."
    )
