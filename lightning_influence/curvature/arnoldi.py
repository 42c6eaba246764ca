"""Inverse curvature on its dominant eigenvectors, found by the Lanczos method."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_integer, one_of
from lightning_influence.curvature.cost import ProductTimes
from lightning_influence.curvature.curvature import PreparedCurvature
from lightning_influence.curvature.damping import of_group
from lightning_influence.curvature.iterative import Iterative, smallest_entry
from lightning_influence.devices import read_numbers, wide, wide_device
from lightning_influence.gradients.products import Products
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.numerics.dense import eigenpairs
from lightning_influence.numerics.solvers import PROBES, lanczos
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import timed

# Vectors of the basis that are timed for an estimate.
_TIMED = 8


@dataclass(frozen=True)
class Arnoldi(Iterative):
    r"""The inverse of a low-rank curvature: its eigenvectors of largest magnitude, computed once for all queries.

    .. math:: (V^\top \Lambda V + D)^{-1} q

    with :math:`\Lambda` and V the Ritz values and vectors of a Krylov space and D the damping and weight decay.

    Source: Schioppa, Zablotskaia, Vilar, Sokolov. Scaling Up Influence Functions. AAAI 2022.
    Cost: ``steps`` products with the curvature (about three passes over the training data each), once; then one matrix
    product per block of queries. Memory: ``steps`` float64 vectors of the size of the parameters.
    Departs from the paper: float64 and full reorthogonalisation; the complement of the eigenvectors is damped instead
    of dropped, unless ``complement="drop"``.

    Args:
        damping: added to the diagonal, in units of the curvature; None chooses it from the fit (see ``Curvature``).
        matrix: invert the Gauss-Newton matrix (``"ggn"``) or the Hessian (``"hessian"``).
        seed: of the first vector of the Krylov space.
        steps: dimension of the Krylov space.
        rank: how many eigenvectors to keep, those of largest magnitude; None to keep all.
        complement: how to treat the part of a gradient outside the eigenvectors. ``"damped"``: the curvature is taken
            as zero there, so that D alone is inverted. ``"drop"``: it is removed, as in the paper.

    Raises:
        ValueError: an argument is out of range; D is 0 for some parameters with ``"damped"``; D cancels an eigenvalue.
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

    def prepare(self, setting: Setting) -> PreparedCurvature:
        """Tensors ``values`` [k] and ``vectors`` [k, parameter]."""
        with (
            self._undamped(setting) as (product, like),
            setting.progress(min(self.steps, like.numel()), "Arnoldi: eigenvectors", "step") as done,
        ):

            def counted(vectors: Tensor) -> Tensor:
                done(1)
                return product(vectors)

            values, vectors = lanczos(counted, like, self.steps, self.seed)
        return PreparedCurvature({"values": values, "vectors": vectors}, super().prepare(setting).diagnostics)

    def seconds_of_preparing(self, setting: Setting) -> float:
        """One product for each step of the Krylov space, its basis, and the probes."""
        times, (some, steps) = ProductTimes.at(setting, self.matrix), self._some(setting)
        # Each step multiplies with the basis so far four times; then come the eigenvectors.
        along = timed(lambda: some @ some[0]) / len(some)
        turned = timed(lambda: some[:, :_TIMED] @ some) / len(some) ** 2
        return times.of(1) * steps + times.of(PROBES) + (2 * along + turned) * steps**2

    def seconds_of_solving(self, setting: Setting, vectors: int) -> float:
        """Three multiplications with the basis for each vector."""
        some, steps = self._some(setting)
        return 3 * steps * vectors * timed(lambda: some @ some[0]) / len(some)

    def _some(self, setting: Setting) -> tuple[Tensor, int]:
        """What stands for a few vectors of the basis, [vector, parameter], and how many it has."""
        products = Products(setting.engine, setting.examples)
        steps, device = min(self.steps, len(products.flat)), wide_device(products.like.device)
        return torch.ones(min(steps, _TIMED), len(products.flat), dtype=torch.float64, device=device), steps

    def solve(
        self, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
    ) -> QueryGradients:
        """Divide by eigenvalue plus diagonal within the span of the eigenvectors, and by the diagonal outside."""
        products = Products(setting.engine, setting.examples)
        values, vectors = self._leading(prepared)
        right = wide(products.flat.join(queries.dense(), len(queries), products.like))
        added = products.flat.fill(of_group(diagonal, setting.engine.groups)).to(right)
        setting.diagnostic("eigenvectors", len(values))
        share = (right @ vectors.T).square().sum() / right.square().sum().clamp_min(1e-300)
        (least,), (known,) = read_numbers([values.min(), share])
        if least + float(diagonal.min()) < 0:
            setting.note(
                f"The {self.name} is not positive definite with this damping: the weights are not at a minimum of the "
                "loss. Use `matrix='ggn'` or a larger `damping=`"
            )
        full = len(values) == len(products.flat)
        if self.complement == "drop" or full:
            solved = self._on_the_span(values, vectors, right, added)
        else:
            smallest_entry(diagonal, self.name, "Arnoldi")
            solved = _low_rank(values, vectors, right, added)
            setting.diagnostic("share_of_gradient_in_eigenvectors", known, keep=min)
        return DenseQueries(products.flat.split(solved.to(products.like)), setting.engine.groups)

    def _leading(self, prepared: PreparedCurvature) -> tuple[Tensor, Tensor]:
        values, vectors = prepared.tensors["values"], prepared.tensors["vectors"]
        if self.rank is not None and self.rank < len(values):
            order = values.abs().argsort(descending=True)[: self.rank].sort().values
            values, vectors = values[order], vectors[order]
        return values, vectors

    def _on_the_span(self, values: Tensor, vectors: Tensor, right: Tensor, added: Tensor) -> Tensor:
        small = values.diag_embed() + (vectors * added) @ vectors.T
        eigenvalues, rotation = eigenpairs((small + small.T) / 2)
        if float(eigenvalues.abs().min()) <= 1e-14 * float(eigenvalues.abs().max()):
            raise ValueError(
                f"Expected an invertible curvature, got a {self.name} that is singular on the span of its leading "
                f"eigenvectors with weight decay + damping = {float(added.min()):.3g}. Pass a larger `damping=` or a "
                "smaller `rank=`."
            )
        axes = rotation.T @ vectors
        return ((right @ axes.T) / eigenvalues) @ axes


def _low_rank(values: Tensor, vectors: Tensor, right: Tensor, added: Tensor) -> Tensor:
    """(V^T diag(values) V + D)^-1 b by the Woodbury identity, in a form that does not divide by an eigenvalue."""
    plain = right / added
    inner = (vectors / added) @ vectors.T
    small = torch.eye(len(values)).to(inner) + values[:, None] * inner
    coefficients = torch.linalg.solve(small, values[:, None] * (plain @ vectors.T).T)
    return plain - (coefficients.T @ vectors) / added
