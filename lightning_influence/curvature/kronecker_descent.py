"""Preconditioned gradient descent per layer, in its Kronecker eigenbasis or with its diagonal Fisher."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.curvature.descent import Descent, mean_exponential
from lightning_influence.curvature.factors import as_matrices, from_matrices, rotated, rows_of
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
    by_name = descent.preconditioner, descent.added, descent.decoupled_decay
    of_layer = [[entries[n] for n in names] for entries in by_name]
    if "eigenvalues" not in kept:
        tables = (kept[f"diagonal{i}"] for i in range(len(names)))
        pairs = [_diagonals(t.double(), *entries) for t, *entries in zip(tables, *of_layer, strict=True)]
        moved, left = (tuple(r * p[k].to(r) for r, p in zip(rows, pairs, strict=True)) for k in (0, 1))
    else:
        moved, left = _in_eigenbasis(kept, [[e[None] for e in entries] for entries in of_layer], rows)
    return dict(zip(names, moved, strict=True)), dict(zip(names, left, strict=True))


def _in_eigenbasis(
    kept: Mapping[str, Tensor], of_layer: list[list[Tensor]], rows: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    transposed = bool(kept["transposed"])
    left, right = kept["basis_out"], kept["basis_in"]
    entries = [as_matrices(e, transposed) for e in of_layer]  # [1, out, in]
    squares = left.double().square(), right.double().square()
    inside = _diagonals(kept["eigenvalues"].double(), *(rotated(e, *squares)[0] for e in entries))
    outside = _diagonals(torch.zeros_like(entries[0][0]), *(e[0] for e in entries))
    matrices = as_matrices(rows, transposed)
    projected = rotated(matrices, left, right)
    complete = all(basis.shape[0] == basis.shape[1] for basis in (left, right))
    found = []
    for within, without in zip(inside, outside, strict=True):
        made = rotated(projected * within.to(projected), left.T, right.T)
        if not complete:  # no training gradient has a component in the other directions: their curvature is 0
            rest = (matrices - rotated(projected, left.T, right.T)) * without.to(projected)
            made = made + rest - rotated(rotated(rest, left, right), left.T, right.T)
        found.append(from_matrices(made, [row.shape[1:] for row in rows], transposed))
    return found[0], found[1]


def _diagonals(eigenvalues: Tensor, preconditioner: Tensor, added: Tensor, decoupled_decay: Tensor) -> Pair:
    """The diagonals of F and of S^T."""
    exponents = preconditioner * (eigenvalues + added) + decoupled_decay
    return preconditioner * mean_exponential(exponents), torch.exp(-exponents)
