"""The dense curvature of a small model, factorised once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.cost import ProductTimes
from lightning_influence.curvature.curvature import Curvature, PreparedCurvature
from lightning_influence.curvature.damping import of_group
from lightning_influence.curvature.descent import Descent, mean_exponential
from lightning_influence.devices import wide, wide_device
from lightning_influence.gradients.products import Matrix, Products
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.module.snapshot import readings_of
from lightning_influence.numerics.dense import Factorisation, SingularError, eigenpairs, factorise
from lightning_influence.setting.setting import Setting
from lightning_influence.timing import timed

# Columns of the matrix that are computed at once.
_COLUMNS = 256
# Rows of the matrix whose factorisation is timed for an estimate, and vectors that it is multiplied by.
_TIMED_SIDE, _TIMED = 1024, 32


@dataclass
class _LastFactor:
    """The latest factorisation, and the prepared curvature it belongs to."""

    prepared: PreparedCurvature | None = None
    factored: Factorisation | None = None


@dataclass(frozen=True)
class Exact(Curvature):
    """A dense curvature, [parameters, parameters] in float64, computed column by column and inverted exactly.

    Cost: one product with the curvature per parameter (about three passes over the training data each) and one
    factorisation, once. Memory grows with the square of the number of parameters, time with its cube.

    Args:
        damping: added to the diagonal, in units of the curvature; None chooses it from the fit (see ``Curvature``).
        max_parameters: a model with more parameters is refused.

    Raises:
        ValueError: the model has too many parameters, or the matrix is singular with this damping.
    """

    max_parameters: int = 10_000

    matrix: ClassVar[Matrix] = "ggn"
    has_eigenvalues: ClassVar[bool] = True
    copies: ClassVar[int | None] = 3
    unprepared: ClassVar[frozenset[str]] = frozenset({"damping", "max_parameters"})

    def prepare(self, setting: Setting) -> PreparedCurvature:
        """The tensor ``matrix`` [parameter, parameter], symmetric."""
        products = Products(setting.engine, setting.examples)
        size = len(products.flat)
        if size > self.max_parameters:
            gib = 8 * size**2 / 2**30
            raise ValueError(
                f"Expected at most {self.max_parameters:,} parameters for `{type(self).__name__}`, got {size:,}: the "
                f"matrix alone takes {gib:,.1f} GiB. Use `ConjugateGradient()` or `EKFAC()`, score fewer parameters "
                "(`parameters=`), or raise `max_parameters=`."
            )
        matrix = torch.empty(size, size, dtype=torch.float64, device=wide_device(products.like.device))
        with setting.progress(size, f"{type(self).__name__}: matrix", "column") as done:
            for start in range(0, size, _COLUMNS):
                unit = torch.zeros(min(_COLUMNS, size - start), size).to(products.like)
                unit[torch.arange(len(unit)), torch.arange(start, start + len(unit))] = 1.0
                matrix[start : start + len(unit)] = wide(products.times(self.matrix, unit))
                done(len(unit))
        matrix = (matrix + matrix.T) / 2
        read = readings_of(setting.engine.task.module).later(matrix.diagonal().mean())
        products.check()
        return PreparedCurvature({"matrix": matrix}, {"mean_eigenvalue": read()[0] if size else 0.0})

    def solve(
        self, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
    ) -> QueryGradients:
        """Solve with the factorisation, for all queries at once."""
        products = Products(setting.engine, setting.examples)
        factor = self.factor(prepared, setting, diagonal)
        vectors = products.flat.join(queries.dense(), len(queries), products.like)
        solved = factor.solve(wide(vectors)).to(vectors)
        return DenseQueries(products.flat.split(solved), setting.engine.groups)

    def descend(
        self, prepared: PreparedCurvature, vectors: Mapping[str, Tensor], setting: Setting, descent: Descent
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """F v and S^T v by an eigendecomposition of M, without approximation."""
        products = Products(setting.engine, setting.examples)
        flat, matrix = products.flat, prepared.tensors["matrix"]
        preconditioner, added, decay = (
            flat.join({name: entry[None] for name, entry in entries.items()}, 1, matrix)[0]
            for entries in (descent.preconditioner, descent.added, descent.decoupled_decay)
        )
        curvature, root = matrix + added.diag_embed(), preconditioner.sqrt()
        values, basis = eigenpairs(root[:, None] * curvature * root + decay.diag_embed())
        rows = wide(flat.join(vectors, len(next(iter(vectors.values()))), products.like))
        moved = ((rows * root) @ basis * mean_exponential(values)) @ basis.T  # F v = root * moved
        # S^T = I - (C + A + D / P) F, without dividing by a P of 0, where D is 0 too.
        decay_by_root = torch.where(root > 0, decay / root, torch.zeros_like(root))
        kept = rows - (moved * root) @ curvature - moved * decay_by_root
        return flat.split((moved * root).to(products.like)), flat.split(kept.to(products.like))

    def factor(self, prepared: PreparedCurvature, setting: Setting, diagonal: Tensor) -> Factorisation:
        """The factorisation of the matrix plus its diagonal, computed once.

        Raises:
            ValueError: the sum is singular.
        """
        kept = setting.state((self, tuple(diagonal.tolist())), _LastFactor)
        if kept.factored is None or kept.prepared is not prepared:  # of one checkpoint at a time
            kept.prepared, kept.factored = prepared, self._factored(prepared, setting, diagonal)
        return kept.factored

    def _factored(self, prepared: PreparedCurvature, setting: Setting, diagonal: Tensor) -> Factorisation:
        products = Products(setting.engine, setting.examples)
        matrix = prepared.tensors["matrix"]
        added = products.flat.fill(of_group(diagonal, setting.engine.groups)).to(matrix)
        try:
            found = factorise(matrix + added.diag_embed(), torch.finfo(products.like.dtype).eps)
        except SingularError as error:
            raise ValueError(
                f"Expected an invertible curvature, got a {self.kind} that is singular with weight decay + damping = "
                f"{float(diagonal.min()):.3g} ({error}). Pass a larger `damping=`, such as "
                f"`{type(self).__name__}(damping={max(0.1 * prepared.diagnostics['mean_eigenvalue'], 1e-12):.1g})`."
            ) from error
        if not found.positive:
            way_out = "a larger `damping=`"
            if self.matrix == "hessian":
                way_out = f"`ExactGGN()`, which has no negative eigenvalues for the usual losses, or {way_out}"
            setting.note(
                f"The {self.kind} is not positive definite with this damping: the weights are not at a minimum of the "
                f"loss. Use {way_out}"
            )
        return found

    def seconds_of_preparing(self, setting: Setting) -> float:
        """One product per parameter."""
        size = len(Products(setting.engine, setting.examples).flat)
        if size > self.max_parameters:  # `prepare` raises at once
            return 0.0
        at_once = min(size, _COLUMNS)
        return ProductTimes.at(setting, self.matrix).of(at_once) * size / at_once

    def seconds_of_solving(self, setting: Setting, vectors: int) -> float:
        """A Cholesky factorisation, and two multiplications by its factor a vector."""
        products = Products(setting.engine, setting.examples)
        size, device = len(products.flat), wide_device(products.like.device)
        if size > self.max_parameters:
            return 0.0
        return _scaled(torch.linalg.cholesky, size, 3, device) + 2 * vectors * _scaled_product(size, device)

    def seconds_of_descent(self, setting: Setting, vectors: Mapping[str, Tensor], descent: Descent) -> float:
        """An eigendecomposition, and four multiplications by matrices a vector."""
        products = Products(setting.engine, setting.examples)
        size, device, count = len(products.flat), wide_device(products.like.device), len(next(iter(vectors.values())))
        return _scaled(torch.linalg.eigh, size, 3, device) + 4 * count * _scaled_product(size, device)


def _scaled_product(size: int, device: torch.device) -> float:
    """Seconds of a matrix of that size times one of many vectors."""
    return _scaled(lambda matrix: matrix @ matrix[:, :_TIMED], size, 2, device) / min(size, _TIMED)


def _scaled(work: Callable[[Tensor], Any], size: int, power: int, device: torch.device) -> float:
    """Seconds of work on a matrix of that size, by those on a smaller one."""
    some = torch.eye(min(size, _TIMED_SIDE), dtype=torch.float64, device=device)
    return timed(lambda: work(some)) * (size / len(some)) ** power
