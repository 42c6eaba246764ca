"""An inverse on the dominant eigenvectors of a Krylov space."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_integer, one_of
from lightning_influence.curvature.curvature import Prepared
from lightning_influence.curvature.damping import of_group
from lightning_influence.curvature.iterative import Iterative, smallest_added
from lightning_influence.gradients.products import Products
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.numerics.solvers import lanczos
from lightning_influence.setting.setting import Setting


@dataclass(frozen=True)
class Arnoldi(Iterative):
    """The curvature on its eigenvectors of largest magnitude, found once for all queries.

    Source: Schioppa, Zablotskaia, Vilar, Sokolov. Scaling Up Influence Functions. AAAI 2022.
    Cost: ``steps`` products with the curvature once, then one matrix product a block of queries; memory for ``steps``
    vectors of float64.
    Departs from the paper: float64 and full reorthogonalisation; what the eigenvectors leave out is damped instead of
    dropped, unless ``complement="drop"``.

    Args:
        damping: see ``Curvature``.
        matrix: ``"ggn"`` or ``"hessian"``.
        seed: of the start vector.
        steps: dimension of the Krylov space.
        rank: how many eigenvectors are kept, those of largest magnitude; None: all.
        complement: ``"damped"``: on everything else the curvature counts as zero, and only the diagonal is inverted;
            ``"drop"``: nothing else counts, as in the paper.

    Raises:
        ValueError: other values; a diagonal of 0 with ``"damped"``; a kept eigenvalue that the diagonal cancels.
    """

    steps: int = 200
    rank: int | None = None
    complement: Literal["damped", "drop"] = "damped"

    unprepared: ClassVar[frozenset[str]] = frozenset({"damping", "rank", "complement"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("steps", self.steps)
        one_of("complement", self.complement, ("damped", "drop"))
        check_integer("rank", self.rank, optional=True)

    def prepare(self, setting: Setting) -> Prepared:
        """``values`` [k] and ``vectors`` [k, parameter]."""
        products = Products(setting.engine, setting.examples)
        like = products.like.detach().new_zeros(len(products.flat))
        values, vectors = lanczos(self._bare(products), like, self.steps, self.seed)
        return Prepared({"values": values, "vectors": vectors}, super().prepare(setting).figures)

    def multiplied(self, vectors: int) -> int:
        """Those of the Krylov space, whatever is solved for."""
        return self.steps

    def solve(self, prepared: Prepared, queries: QueryGradients, setting: Setting, diagonal: Tensor) -> QueryGradients:
        """On the span by its eigenvalues, elsewhere by the diagonal."""
        products = Products(setting.engine, setting.examples)
        values, vectors = self._kept(prepared)
        right = products.flat.join(queries.dense(), len(queries), products.like).double()
        added = products.flat.fill(of_group(diagonal, setting.engine.groups)).to(right)
        setting.diagnostic("eigenvectors", len(values))
        full = len(values) == len(products.flat)
        if self.complement == "drop" or full:
            solved = self._on_the_span(values, vectors, right, added)
        else:
            smallest_added(diagonal, self.name, "Arnoldi")
            solved = _low_rank(values, vectors, right, added)
            share = (right @ vectors.T).square().sum() / right.square().sum().clamp_min(1e-300)
            setting.diagnostic("share_of_gradient_in_eigenvectors", float(share), keep=min)
        return DenseQueries(products.flat.split(solved.to(products.like)), setting.engine.groups)

    def _kept(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        values, vectors = prepared.tensors["values"], prepared.tensors["vectors"]
        if self.rank is not None and self.rank < len(values):
            order = values.abs().argsort(descending=True)[: self.rank].sort().values
            values, vectors = values[order], vectors[order]
        return values, vectors

    def _on_the_span(self, values: Tensor, vectors: Tensor, right: Tensor, added: Tensor) -> Tensor:
        small = values.diag_embed() + (vectors * added) @ vectors.T
        eigenvalues, turned = torch.linalg.eigh((small + small.T) / 2)
        if float(eigenvalues.abs().min()) <= 1e-14 * float(eigenvalues.abs().max()):
            raise ValueError(
                f"Expected a curvature that can be inverted, got a {self.name} that is singular on its own "
                f"eigenvectors with a diagonal of {float(added.min()):.3g}. Pass a larger `damping=` or a smaller "
                "`rank=`."
            )
        axes = turned.T @ vectors
        return ((right @ axes.T) / eigenvalues) @ axes


def _low_rank(values: Tensor, vectors: Tensor, right: Tensor, added: Tensor) -> Tensor:
    """(V^T diag(values) V + D)^-1 b by Woodbury, written without dividing by an eigenvalue."""
    plain = right / added
    inner = (vectors / added) @ vectors.T
    small = torch.eye(len(values)).to(inner) + values[:, None] * inner
    felt = torch.linalg.solve(small, values[:, None] * (plain @ vectors.T).T)
    return plain - (felt.T @ vectors) / added
