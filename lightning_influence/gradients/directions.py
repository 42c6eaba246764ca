"""Dense vectors of queries, multiplied with training gradients in whichever order is cheaper."""

from dataclasses import dataclass

from torch import Tensor

from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.part import Part


@dataclass(frozen=True, eq=False)
class Directions(DenseRows):
    """Dense rows whose inner products with other gradients do not require those to be dense."""

    def accumulate_dot(self, other: Part, out: Tensor) -> None:
        """``out[i, j] += <direction i, gradient j of other>``."""
        out += other.times_each(self.rows)
