"""An inverse Kronecker-factored Fisher times gradients of one outer product each, without building them densely."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.curvature.factors import as_matrices, from_matrices, rotated, rotated_inputs
from lightning_influence.gradients.directions import Directions
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.part import Part
from lightning_influence.numerics.projections import Sketch

# A basis is completed where it has at least this many times the directions that it lacks.
_FEW = 4


@dataclass(frozen=True, eq=False)
class Bases:
    """The Kronecker eigenbasis of one layer.

    Args:
        basis_out: eigenvectors of the output side, [out, k].
        basis_in: eigenvectors of the input side, [in, l].
        transposed: whether the weight is stored as [in, out].
    """

    basis_out: Tensor
    basis_in: Tensor
    transposed: bool

    @property
    def complete(self) -> bool:
        """Whether the bases span the whole space."""
        return all(b.shape[0] == b.shape[1] for b in (self.basis_out, self.basis_in))


@dataclass(frozen=True, eq=False)
class KroneckerInverse(Bases):
    """The inverse of one layer's Fisher plus a diagonal, in its Kronecker eigenbasis.

    Args:
        table: 1 / (eigenvalue + diagonal), [k, l].
        outside: 1 / diagonal, for the directions outside the bases, in which no gradient that was factored had a
            component. Gradients with the labels of the data may have one where others were sampled.
        shapes: the shape of the weight, or those of the weight and its bias.
    """

    table: Tensor
    outside: float
    shapes: tuple[tuple[int, ...], ...]

    def completed(self) -> "KroneckerInverse":
        """The same with the missing directions in its bases, where they are few."""
        found = replace(self, basis_out=_completed(self.basis_out), basis_in=_completed(self.basis_in))
        table = self.table.new_full((found.basis_out.shape[1], found.basis_in.shape[1]), self.outside)
        table[: self.table.shape[0], : self.table.shape[1]] = self.table
        return replace(found, table=table)

    def rotated(self, part: OuterProducts) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients of a single position in the bases, [example, l] and [example, k]."""
        inputs = rotated_inputs(part.inputs[:, 0], part.bias, self.basis_in)
        return inputs, part.scaled_outputs()[:, 0] @ self.basis_out

    def solve(self, written: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inverse times dense gradients, [example, *shape] for each parameter."""
        matrices = as_matrices(written, self.transposed)
        table = self.table if self.complete else self.table - self.outside
        inside = rotated(matrices, self.basis_out, self.basis_in) * table
        found = rotated(inside, self.basis_out.T, self.basis_in.T)
        if not self.complete:
            found = found + self.outside * matrices
        return from_matrices(found, self.shapes, self.transposed)


@dataclass(frozen=True, eq=False)
class KroneckerPart(Part):
    """An inverse times gradients that are one outer product each, kept in factors.

    Args:
        inverse: the layer's inverse.
        gradients: the gradients that the inverse is multiplied by.
        inputs: their inputs in the basis, [query, l].
        outputs: their output gradients in the basis, [query, k].
        low_rank: factors [r, k] and [r, l] of the inverse's table; None to use the table itself.
    """

    inverse: KroneckerInverse
    gradients: OuterProducts
    inputs: Tensor
    outputs: Tensor
    low_rank: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.outputs)

    @property
    def like(self) -> Tensor:
        """Any tensor of this part: its dtype and device."""
        return self.outputs

    def slice(self, rows: slice) -> "KroneckerPart":
        """Some of the queries."""
        return replace(self, gradients=self.gradients.slice(rows), inputs=self.inputs[rows], outputs=self.outputs[rows])

    def scaled(self, factor: Tensor) -> "KroneckerPart":
        """Each direction times its own number."""
        outputs = self.outputs * factor.to(self.outputs)[:, None]
        return replace(self, gradients=self.gradients.scaled(factor), outputs=outputs)

    def dense(self) -> tuple[Tensor, ...]:
        """[query, *shape] for each parameter."""
        return self.inverse.solve(self.gradients.dense())

    def accumulate_dot(self, other: Part, out: Tensor) -> None:
        """``out[i, j] += <direction i, gradient j of other>``."""
        if not isinstance(other, OuterProducts) or other.outputs.shape[1] != 1:
            out += other.times_each(self.dense())
            return
        inputs, outputs = self.inverse.rotated(other)
        if self.low_rank is None:
            block = OuterProducts(inputs[:, None], outputs[:, None], tuple(self.inverse.table.shape))
            directions = self.outputs[:, :, None] * self.inverse.table * self.inputs[:, None]
            out += block.times_each((directions,))
            return
        for left, right in zip(*self.low_rank, strict=True):
            out.addcmul_((self.outputs * left) @ outputs.T, (self.inputs * right) @ inputs.T)

    def norm2(self) -> Tensor:
        """[query]: squared length of each direction."""
        inverse, outputs, inputs = self.inverse, self.outputs.square(), self.inputs.square()
        if inverse.complete:
            return (outputs @ inverse.table.square() * inputs).sum(1)
        inside = (outputs @ (inverse.table.square() - inverse.outside**2) * inputs).sum(1)
        return inside + inverse.outside**2 * self.gradients.norm2()

    def times(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """[query]: inner product of each direction with one parameter-shaped vector."""
        return self.gradients.times(tuple(v[0] for v in self.inverse.solve(tuple(v[None] for v in vectors))))

    def total(self) -> tuple[Tensor, ...]:
        """The sum over the queries, parameter-shaped."""
        return tuple(v[0] for v in self.inverse.solve(tuple(v[None] for v in self.gradients.total())))

    def query_bytes(self, n_queries: int) -> int:
        """Bytes that one query takes."""
        return self.gradients.query_bytes(n_queries) + (self.inputs[0].numel() + self.outputs[0].numel()) * 8

    def merged(self, other: Part) -> Part | None:
        """None: directions are not merged."""
        return None

    def per_parameter(self) -> tuple[Part, ...]:
        """Dense, with one part per parameter."""
        return tuple(Directions((rows,)) for rows in self.dense())

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each parameter."""
        return self.inverse.shapes

    def projected(self, sketches: Sequence[Sketch]) -> tuple[Part, ...]:
        """Dense, with each parameter's sketch applied."""
        return Directions(self.dense()).projected(sketches)

    def finite(self) -> Tensor:
        """[query]: whether every number is finite."""
        return self.gradients.finite()


def _completed(basis: Tensor) -> Tensor:
    """A basis [width, direction] with further directions that make it complete; as it is if these would be many."""
    width, known = basis.shape
    missing = width - known
    if missing == 0 or _FEW * missing > known:
        return basis
    rest = torch.randn(width, missing, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(basis)
    for _ in range(2):  # once leaves rounding errors of the basis
        rest = torch.linalg.qr((rest - basis @ (basis.T @ rest)).cpu()).Q.to(basis)
    return torch.cat([basis, rest], 1)
