"""Second moments, their eigenbases, and tables of eigenvalues as few products of vectors as their weight asks for."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


class SecondMoment:
    """The sum of outer products of rows that come in blocks.

    While there are clearly fewer rows than columns the rows themselves are kept: their Gram matrix has the same
    eigenvalues and is smaller.

    Args:
        width: columns, with the one that is 1 where there is a bias.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self._rows: list[Tensor] = []
        self._sum: Tensor | None = None

    def add(self, rows: Tensor, bias: bool = False) -> None:
        """Takes in [row, width], or [row, width - 1] that have a 1 behind them."""
        self.count += len(rows)
        if self._sum is None and self.count <= 0.75 * self.width:
            self._rows.append(F.pad(rows, (0, 1), value=1.0) if bias else rows)
            return
        if self._sum is None:
            self._sum = rows.new_zeros(self.width, self.width)
            for kept in self._rows:
                self._sum.addmm_(kept.T, kept)
            self._rows.clear()
        if not bias:
            self._sum.addmm_(rows.T, rows)
            return
        self._sum[:-1, :-1].addmm_(rows.T, rows)
        total = rows.sum(0)
        self._sum[-1, :-1] += total
        self._sum[:-1, -1] += total
        self._sum[-1, -1] += len(rows)

    def basis(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The eigenbasis; directions in which no row has a part are left out.

        Returns:
            Eigenvalues, falling; eigenvectors in columns; where the rows were few, all of them in the basis.
        """
        if self._sum is not None:
            values, vectors = torch.linalg.eigh(self._sum)
            return *_leading(values, vectors, 2.0), None
        rows = torch.cat(self._rows)
        # A Gram matrix of rounded rows knows its small eigenvalues less well.
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        values, vectors = _leading(values, vectors, 8.0)
        return values, rows.T @ (vectors / values.sqrt()), vectors * values.sqrt()


def _leading(values: Tensor, vectors: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    values, vectors = values.flip(0), vectors.flip(1)
    # What rounding leaves of a zero eigenvalue; rows that are all zero keep one direction.
    kept = max(1, int((values > noise * torch.finfo(values.dtype).eps * values[0]).sum()))
    return values[:kept].clamp_min(torch.finfo(values.dtype).tiny), vectors[:, :kept].contiguous()


def products(table: Tensor, left: Tensor, right: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Truncations of a table [m, k] to a sum of r outer products, near where its two sides carry weight.

    A score sums the table times one number for each entry, whose size is that of ``left`` times ``right``: what an
    entry is off by counts as much. Truncating the table itself instead would spend the products on entries of no
    weight.

    Args:
        table: the eigenvalues' inverse.
        left: weights of its rows, [m].
        right: of its columns, [k].

    Returns:
        For r, the factors [r, m] and [r, k].
    """
    left, right = (w.double().clamp_min(1e-12 * float(w.max())) for w in (left, right))
    weighted = left[:, None] * table.double() * right
    turned = weighted.shape[0] > weighted.shape[1]
    if turned:
        weighted = weighted.T
    _, vectors = torch.linalg.eigh(weighted @ weighted.T)
    vectors = vectors.flip(1)
    others = weighted.T @ vectors
    if turned:
        vectors, others = others, vectors

    def truncated(rank: int) -> tuple[Tensor, Tensor]:
        return (vectors[:, :rank] / left[:, None]).T.to(table), (others[:, :rank] / right[:, None]).T.to(table)

    return truncated
