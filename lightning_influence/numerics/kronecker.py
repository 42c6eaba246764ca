"""Second moments with their eigenbases, and low-rank approximations of a table of eigenvalues."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.devices import on_device, wide
from lightning_influence.numerics.dense import SMALL, all_eigenpairs, eigenpairs

STORED = 0.75
"""While there are at most this many rows per column, they are stored."""


class SecondMoment:
    """The sum of the outer products of rows, which are added in blocks.

    While there are clearly fewer rows than columns, the rows themselves are stored: their Gram matrix is smaller and
    has the same nonzero eigenvalues.

    Args:
        width: the number of columns, including the column of ones of a bias.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self._rows: list[Tensor] = []
        self._sum: Tensor | None = None

    def add(self, rows: Tensor, bias: bool = False) -> None:
        """Add rows, [row, width]; with a bias [row, width - 1], to which a column of ones is appended."""
        self.count += len(rows)
        if self._sum is None and self.count <= STORED * self.width:
            self._rows.append(F.pad(rows, (0, 1), value=1.0) if bias else rows)
            return
        outer = self._outer(rows)
        if not bias:
            outer.addmm_(rows.T, rows)
            return
        outer[:-1, :-1].addmm_(rows.T, rows)
        total = rows.sum(0)
        outer[-1, :-1] += total
        outer[:-1, -1] += total
        outer[-1, -1] += len(rows)

    def replace_sum(self, summed: Callable[[Tensor], Tensor]) -> Tensor:
        """Replace the sum and the number of rows by what a function makes of them, such as sums over processes."""
        self._sum = summed(self._outer(self._rows[0] if self._rows else torch.empty(0)))
        self.count = int(summed(torch.tensor(self.count, device=self._sum.device)))
        return self._sum

    def _outer(self, like: Tensor) -> Tensor:
        """The sum [width, width], of which the rows become a part."""
        if self._sum is None:
            self._sum = like.new_zeros(self.width, self.width)
            for kept in self._rows:
                self._sum.addmm_(kept.T, kept)
            self._rows.clear()
        return self._sum

    @property
    def side(self) -> int:
        """The width of the matrix whose eigenvectors are computed."""
        return self.width if self._sum is not None else self.count

    def _matrix(self) -> Tensor:
        """The sum, or the Gram matrix of the stored rows."""
        if self._sum is None:
            self._rows = [torch.cat(self._rows)]
        return self._rows[0] @ self._rows[0].T if self._sum is None else self._sum

    def _leading(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The eigenvalues and eigenvectors of the matrix that are not 0, in descending order, where they are."""
        # The small eigenvalues of a Gram matrix of rounded rows are less accurate.
        noise = 8.0 if self._sum is None else 2.0
        values, vectors = values.flip(0), vectors.flip(1)
        # Drop eigenvalues that are zero up to rounding; rows that are all zero keep one direction.
        kept = max(1, int((values > noise * torch.finfo(values.dtype).eps * values[0]).sum()))
        return values[:kept].clamp_min(torch.finfo(values.dtype).tiny), vectors[:, :kept].contiguous()

    def _basis(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``bases``; from the leading eigenvectors of the matrix."""
        if self._sum is not None:
            return values.to(self._sum), vectors.to(self._sum), None
        (rows,) = self._rows
        values, vectors = values.to(rows), vectors.to(rows)
        return values, rows.T @ (vectors / values.sqrt()), vectors * values.sqrt()


def bases(moments: Sequence[SecondMoment]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The eigenbasis of each row space; directions orthogonal to all rows are left out.

    Yields:
        Eigenvalues in descending order; eigenvectors as columns; the rows expressed in the basis if they were stored,
        else None.
    """
    small = [moment for moment in moments if moment.side <= SMALL]
    matrices = [moment._matrix() for moment in small]
    leading = [moment._leading(*pair) for moment, pair in zip(small, all_eigenpairs(matrices), strict=True)]
    if small:  # which come from the CPU together
        arrived = list(on_device([each for pair in leading for each in pair], matrices[0].device))
        leading = list(zip(arrived[::2], arrived[1::2], strict=True))
    found = dict(zip(map(id, small), leading, strict=True))
    for moment in moments:
        yield moment._basis(*(found.get(id(moment)) or moment._leading(*all_eigenpairs([moment._matrix()])[0])))


def weighted_truncation(table: Tensor, left: Tensor, right: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Low-rank approximations of a table [m, k], best in a norm that weights its rows and columns.

    A score is the sum over the table's entries, each times a number of the size of ``left`` times ``right``, so an
    error in an entry matters in that proportion. An unweighted truncation would spend its rank on entries that hardly
    contribute.

    Args:
        table: the inverse eigenvalues.
        left: weights of the rows, [m].
        right: weights of the columns, [k].

    Returns:
        A function of the rank r: the factors [r, m] and [r, k] of r outer products whose sum approximates the table.
    """
    left, right = (wide(w).clamp_min(1e-12 * float(w.max())) for w in (left, right))
    weighted = left[:, None] * wide(table) * right
    turned = weighted.shape[0] > weighted.shape[1]
    if turned:
        weighted = weighted.T
    _, vectors = eigenpairs(weighted @ weighted.T)
    vectors = vectors.flip(1)
    others = weighted.T @ vectors
    if turned:
        vectors, others = others, vectors

    def truncated(rank: int) -> tuple[Tensor, Tensor]:
        return (vectors[:, :rank] / left[:, None]).T.to(table), (others[:, :rank] / right[:, None]).T.to(table)

    return truncated
