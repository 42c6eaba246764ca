"""Preconditioned gradient descent per layer, in its Kronecker eigenbasis or with its diagonal Fisher."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.curvature.descent import Descent, mean_exponential
from lightning_influence.curvature.factors import as_matrices, from_matrices, rotated, rows_of
from lightning_influence.curvature.kronecker_part import Bases
from lightning_influence.devices import decomposable, wide
from lightning_influence.gradients.block import Names

Pair = tuple[Tensor, Tensor]


def descend_layer(
    names: Names, kept: Mapping[str, Tensor], descent: Descent, vectors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """F v and S^T v (see ``Descent``) of one layer, for vectors [vector, *shape] by name.

    In an eigenbasis, P, A and D are replaced by their diagonals there. That is exact if they are constant within the
    layer; otherwise it neglects their coupling between eigenvectors.
    """
    rows = rows_of(names, vectors, {n: descent.preconditioner[n].shape for n in names})
    if not rows:
        return {}, {}
    of_layer = _entries(names, descent)
    if "eigenvalues" not in kept:
        tables = (kept[f"diagonal{i}"] for i in range(len(names)))
        pairs = [_diagonals(wide(t), *entries) for t, *entries in zip(tables, *of_layer, strict=True)]
        moved, left = (tuple(r * p[k].to(r) for r, p in zip(rows, pairs, strict=True)) for k in (0, 1))
    else:
        moved, left = _in_eigenbasis(kept, of_layer, rows, descent.is_uniform(names))
    return dict(zip(names, moved, strict=True)), dict(zip(names, left, strict=True))


def complete_descent(names: Names, kept: Mapping[str, Tensor], descent: Descent) -> tuple[Bases, Pair] | None:
    """A layer's eigenbasis, completed by directions without curvature, and the diagonals of F and S^T in it.

    None if the layer has no eigenbasis, lacks most directions, or if F or S is not a number outside the basis.
    """
    if "eigenvalues" not in kept:
        return None
    transposed, bases = bool(kept["transposed"]), [kept["basis_out"], kept["basis_in"]]
    entries, eigenvalues = [as_matrices(_rows(e), transposed) for e in _entries(names, descent)], kept["eigenvalues"]
    beyond = _Outside(*bases)
    if beyond:
        if not (beyond.narrow and descent.is_uniform(names)):
            return None
        bases = [torch.cat(sides, 1) for sides in zip(bases, beyond.ends, strict=True)]
        more = [end.shape[1] for end in beyond.ends]
        eigenvalues = F.pad(eigenvalues, (0, more[1], 0, more[0]))
    return Bases(bases[0], bases[1], transposed), _inside(eigenvalues, entries, bases[0], bases[1])


def _entries(names: Names, descent: Descent) -> list[list[Tensor]]:
    """The diagonals of P, A and D for each of a layer's parameters."""
    return [[by_name[n] for n in names] for by_name in (descent.preconditioner, descent.added, descent.decoupled_decay)]


def _rows(entries: list[Tensor]) -> list[Tensor]:
    return [e[None] for e in entries]


def _inside(eigenvalues: Tensor, entries: list[Tensor], left: Tensor, right: Tensor) -> Pair:
    """The diagonals of F and S^T in an eigenbasis, from those of P, A and D, [1, out, in] each."""
    squares = wide(left).square(), wide(right).square()
    return _diagonals(wide(eigenvalues), *(rotated(e, *squares)[0] for e in entries))


def _in_eigenbasis(
    kept: Mapping[str, Tensor], of_layer: list[list[Tensor]], rows: tuple[Tensor, ...], uniform: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    transposed = bool(kept["transposed"])
    left, right = kept["basis_out"], kept["basis_in"]
    entries = [as_matrices(_rows(e), transposed) for e in of_layer]  # [1, out, in]
    inside = _inside(kept["eigenvalues"], entries, left, right)
    outside = _diagonals(torch.zeros_like(entries[0][0]), *(e[0] for e in entries))
    matrices = as_matrices(rows, transposed)
    projected = rotated(matrices, left, right)
    beyond = _Outside(left, right)
    rest = beyond.of(matrices) if beyond else None  # there the curvature is 0
    found = []
    for within, without in zip(inside, outside, strict=True):
        made = rotated(projected * within.to(projected), left.T, right.T)
        if rest is not None:
            made += beyond.scaled(rest, without, uniform)
        found.append(from_matrices(made, [row.shape[1:] for row in rows], transposed))
    return found[0], found[1]


class _Outside:
    """The part of matrices [.., out, in] outside the bases of a layer: no training gradient has a component there."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.bases = left, right
        self.narrow = all(basis.shape[0] <= 2 * basis.shape[1] for basis in self.bases)
        self.ends = tuple(_complement(basis) for basis in self.bases) if self.narrow else ()

    def __bool__(self) -> bool:
        return any(basis.shape[0] > basis.shape[1] for basis in self.bases)

    def of(self, matrices: Tensor) -> Tensor:
        """As the components along the complements of the bases, whose rounding errors are no larger than they are."""
        left, right = self.bases
        if not self.narrow:
            return matrices - rotated(rotated(matrices, left, right), left.T, right.T)
        found = (matrices @ self.ends[1]) @ self.ends[1].T
        if self.ends[0].shape[1]:
            found += self.ends[0] @ ((self.ends[0].T @ matrices) @ right) @ right.T
        return found

    def scaled(self, rest: Tensor, factors: Tensor, uniform: bool) -> Tensor:
        """What is outside, times factors [out, in] (all the same if ``uniform``), as far as that is outside."""
        scaled = rest * factors.to(rest)
        return scaled if self.narrow and uniform else self.of(scaled)


def _complement(basis: Tensor) -> Tensor:
    """An orthonormal basis, [side, side - k], of what is orthogonal to one, [side, k]."""
    side, count = basis.shape
    if side == count:
        return basis[:, :0]
    return torch.linalg.qr(decomposable(basis), mode="complete")[0][:, count:].to(basis)


def _diagonals(eigenvalues: Tensor, preconditioner: Tensor, added: Tensor, decoupled_decay: Tensor) -> Pair:
    """The diagonals of F and of S^T."""
    exponents = preconditioner * (eigenvalues + added) + decoupled_decay
    return preconditioner * mean_exponential(exponents), torch.exp(-exponents)
