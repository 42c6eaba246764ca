"""Preconditioned gradient descent per layer, in its Kronecker eigenbasis or with its diagonal Fisher."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.curvature.descent import Descent, share_moved
from lightning_influence.curvature.factors import Names, matrix_of, rotated, written_of

Pair = tuple[Tensor, Tensor]


def descend_layer(
    names: Names, kept: Mapping[str, Tensor], descent: Descent, vectors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """F v and S^T v (see ``Descent``) of one layer, for vectors [vector, *shape] by name.

    In an eigenbasis, P, A and D are replaced by their diagonals there. That is exact if they are constant within the
    layer; otherwise it neglects their coupling between eigenvectors.
    """
    present = [vectors[name] for name in names if name in vectors]
    if not present:
        return {}, {}
    like = present[0]
    rows = tuple(vectors[n] if n in vectors else like.new_zeros(len(like), *descent.pace[n].shape) for n in names)
    of_layer = [[entries[n] for n in names] for entries in (descent.pace, descent.added, descent.shrunk)]
    if "eigenvalues" not in kept:
        tables = (kept[f"diagonal{i}"] for i in range(len(names)))
        pairs = [_pair(t.double(), *entries) for t, *entries in zip(tables, *of_layer, strict=True)]
        moved, left = (tuple(r * p[k].to(r) for r, p in zip(rows, pairs, strict=True)) for k in (0, 1))
    else:
        moved, left = _turned(kept, [[e[None] for e in entries] for entries in of_layer], rows)
    return dict(zip(names, moved, strict=True)), dict(zip(names, left, strict=True))


def _turned(
    kept: Mapping[str, Tensor], of_layer: list[list[Tensor]], rows: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    transposed = bool(kept["transposed"])
    left, right = kept["basis_out"], kept["basis_in"]
    entries = [matrix_of(e, transposed) for e in of_layer]  # [1, out, in]
    squares = left.double().square(), right.double().square()
    inside = _pair(kept["eigenvalues"].double(), *(rotated(e, *squares)[0] for e in entries))
    beside = _pair(torch.zeros_like(entries[0][0]), *(e[0] for e in entries))
    matrices = matrix_of(rows, transposed)
    turned = rotated(matrices, left, right)
    complete = all(basis.shape[0] == basis.shape[1] for basis in (left, right))
    found = []
    for within, without in zip(inside, beside, strict=True):
        made = rotated(turned * within.to(turned), left.T, right.T)
        if not complete:  # no training gradient has a component in the other directions: their curvature is 0
            rest = (matrices - rotated(turned, left.T, right.T)) * without.to(turned)
            made = made + rest - rotated(rotated(rest, left, right), left.T, right.T)
        found.append(written_of(made, [row.shape[1:] for row in rows], transposed))
    return found[0], found[1]


def _pair(eigenvalues: Tensor, pace: Tensor, added: Tensor, shrunk: Tensor) -> Pair:
    """The diagonals of F and of S^T."""
    exponents = pace * (eigenvalues + added) + shrunk
    return pace * share_moved(exponents), torch.exp(-exponents)
