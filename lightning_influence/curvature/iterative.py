"""What iterative solvers share: products with the damped curvature, and the diagnostics of a solution."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_influence.checks import one_of
from lightning_influence.curvature.cost import ProductTimes, some_queries
from lightning_influence.curvature.curvature import Curvature, PreparedCurvature
from lightning_influence.curvature.damping import diagonal_at, of_group
from lightning_influence.curvature.watch import GO_ON, PARTS, SolverWatch
from lightning_influence.gradients.products import Matrix, Products
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.module.snapshot import readings_of
from lightning_influence.numerics.solvers import Product, Solution, Watch, conjugate_gradient, mean_diagonal
from lightning_influence.setting.samples import first_examples
from lightning_influence.setting.setting import Setting
from lightning_influence.wording import counted

# What is solved for an estimate: training examples, queries, and the most iterations.
_EXAMPLES, _QUERIES, _TRIED = 64, 2, 60

Solver = Callable[[Product, Tensor, Watch], Solution]
"""Called with the product, the right-hand sides and what is called after each iteration."""


class _OnFew(NamedTuple):
    """A curvature prepared on a few training examples, for an estimate.

    Args:
        setting: a question on these examples alone.
        prepared: the curvature.
        products: how many vectors each product had that it took.
    """

    setting: Setting
    prepared: PreparedCurvature
    products: tuple[int, ...]


@dataclass(frozen=True)
class Iterative(Curvature):
    """The base class of inverses that need only products with the curvature, in the memory of a few vectors per query.

    Args:
        damping: added to the diagonal, in units of the curvature; None chooses it from the fit (see ``Curvature``).
        matrix: the Gauss-Newton matrix (``"ggn"``) or the Hessian (``"hessian"``).
        seed: of the random probes that estimate eigenvalues.
    """

    matrix: Matrix = "ggn"
    seed: int = 0

    copies: ClassVar[int | None] = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("matrix", self.matrix, ("ggn", "hessian"))

    @property
    def name(self) -> str:
        """The matrix's name in messages."""
        return "GGN" if self.matrix == "ggn" else "Hessian"

    def prepare(self, setting: Setting) -> PreparedCurvature:
        """The mean eigenvalue, by Hutchinson's estimate with 32 seeded random vectors."""
        with self._undamped(setting) as undamped:
            read = readings_of(setting.engine.task.module).later(mean_diagonal(*undamped, self.seed))
        return PreparedCurvature(diagnostics={"mean_eigenvalue": read()[0]})

    def seconds_of_preparing(self, setting: Setting) -> float:
        """The products that it takes on a few training examples, at the time of those on all."""
        times = ProductTimes.at(setting, self.matrix)
        return sum(times.of(vectors) for vectors in self._on_few(setting).products)

    def seconds_of_solving(self, setting: Setting, vectors: int) -> float:
        """The iterations that it takes on a few training examples, at the time of products with all.

        They are about as many: at most 60 with 64 examples and two queries are made.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            iterations = self._iterations(setting)
        at_once = min(vectors, self.at_once(setting) or vectors)
        each = ProductTimes.at(setting, self.matrix).of(at_once)
        return (iterations + 1) * each * vectors / max(1, at_once)

    def _on_few(self, setting: Setting) -> "_OnFew":
        """The curvature prepared on a few training examples, once for all estimates."""
        return setting.state(("on few", self), self._prepared_on_few, setting)

    def _prepared_on_few(self, setting: Setting) -> "_OnFew":
        few = first_examples(setting, _EXAMPLES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = self.prepare(few)
        return _OnFew(few, prepared, tuple(_products_of(few)))

    def _iterations(self, setting: Setting) -> float:
        """How many iterations a solver takes, by those on a few training examples."""
        few, prepared, _ = self._on_few(setting)
        queries = some_queries(setting, _QUERIES)
        limit = next(name for name in ("max_iterations", "depth") if hasattr(self, name))
        tolerance, most = float(self.tolerance), int(getattr(self, limit))  # type: ignore[attr-defined]
        diagonal = self._diagonal(few, setting, prepared)
        with contextlib.suppress(ValueError):  # raised again when scores are computed
            replace(self, **{limit: min(most, _TRIED)}).solve(  # type: ignore[arg-type]
                prepared, queries, few, diagonal
            )
        residual, tried = few.diagnostics.get("solver_residual", 1.0), few.diagnostics.get("solver_iterations", 0.0)
        if residual <= 10 * tolerance:
            return tried
        # Residuals fall about exponentially.
        return min(most, tried * math.log(tolerance) / math.log(residual)) if residual < 1 else most

    def rough_seconds(self, setting: Setting, vectors: int, tolerance: float, iterations: int) -> float:
        """Estimate the seconds of ``roughly_solved`` for so many vectors likewise."""
        few, prepared, _ = self._on_few(setting)
        diagonal = self._diagonal(few, setting, prepared)
        solution, _ = self._rough(some_queries(setting, _QUERIES), few, diagonal, tolerance, iterations)
        return (solution.iterations + 1) * ProductTimes.at(setting, "ggn").of(vectors)

    def _diagonal(self, few: Setting, setting: Setting, prepared: PreparedCurvature) -> Tensor:
        """What is added to the curvature's diagonal, which was prepared on a few training examples, [group]."""
        mean = lambda: self.mean_eigenvalue(prepared, few)  # noqa: E731
        return diagonal_at(setting, setting.final(), self.damping, mean, self.share).total

    @contextlib.contextmanager
    def _undamped(self, setting: Setting) -> Iterator[tuple[Product, Tensor]]:
        """The product with the curvature alone, and a vector of zeros of its size, dtype and device."""
        products = Products(setting.engine, setting.examples)
        like = products.like.detach().new_zeros(len(products.flat))
        yield lambda vectors: self._product(setting, products, vectors), like
        products.check()

    def _product(self, setting: Setting, products: Products, vectors: Tensor) -> Tensor:
        """A product with the curvature, which is counted."""
        _products_of(setting).append(len(vectors))
        return products.times(self.matrix, vectors)

    def _solved(
        self, queries: QueryGradients, setting: Setting, diagonal: Tensor, run: Solver
    ) -> tuple[Solution, QueryGradients]:
        """Solve for a block of queries and record the residual and the iterations."""
        products = Products(setting.engine, setting.examples)
        right = products.flat.join(queries.dense(), len(queries), products.like)
        good = right.isfinite().all(1)  # the attributor reports the others
        added = products.flat.fill(of_group(diagonal, setting.engine.groups)).to(products.like)

        def damped(vectors: Tensor) -> Tensor:
            return self._product(setting, products, vectors) + added * vectors

        with setting.progress(PARTS, f"{type(self).__name__}: solving", "%") as done:
            watch = SolverWatch(setting, float(self.tolerance), done)  # type: ignore[attr-defined]
            solution = run(damped, torch.where(good[:, None], right, 0), watch)
        readings = readings_of(setting.engine.task.module)
        arriving = [readings.arriving(each) for each in (solution.residuals, solution.indefinite, solution.diverged)]
        products.check()
        residuals, indefinite, diverged = (read() for read in arriving)
        solution = replace(solution, residuals=residuals, indefinite=indefinite, diverged=diverged)
        worst = float(solution.residuals.max())
        watch.refuse(type(self).__name__, worst, solution.iterations)
        if watch.stopped:
            solution = replace(solution, stopped=True)
            setting.warn(
                f"`{type(self).__name__}` was stopped at the limit of time after "
                f"{counted(solution.iterations, 'iteration')}, with a residual of {worst:.2g}. {GO_ON}"
            )
        setting.diagnostic("solver_residual", worst)
        setting.diagnostic("solver_iterations", solution.iterations)
        found = torch.where(good[:, None], solution.vectors, torch.nan)
        return solution, DenseQueries(products.flat.split(found), setting.engine.groups)

    def roughly_solved(
        self, queries: QueryGradients, setting: Setting, diagonal: Tensor, tolerance: float, iterations: int
    ) -> QueryGradients:
        """Solve by conjugate gradients with the GGN, and report nothing."""
        return self._rough(queries, setting, diagonal, tolerance, iterations)[1]

    def _rough(
        self, queries: QueryGradients, setting: Setting, diagonal: Tensor, tolerance: float, iterations: int
    ) -> tuple[Solution, QueryGradients]:
        products = Products(setting.engine, setting.examples)
        right = products.flat.join(queries.dense(), len(queries), products.like)
        added = products.flat.fill(of_group(diagonal, setting.engine.groups)).to(products.like)

        def damped(vectors: Tensor) -> Tensor:
            return products.times("ggn", vectors) + added * vectors

        finite = torch.where(right.isfinite().all(1)[:, None], right, 0)
        solution = conjugate_gradient(damped, finite, tolerance, iterations)
        return solution, DenseQueries(products.flat.split(solution.vectors), setting.engine.groups)


def _products_of(setting: Setting) -> list[int]:
    """How many vectors each product with a curvature had in a question so far."""
    made: list[int] = setting.state("products", list)
    return made


def smallest_entry(diagonal: Tensor, kind: str, name: str) -> float:
    """The smallest entry of a diagonal.

    Raises:
        ValueError: it is not positive, with which a solver might not converge.
    """
    least = float(diagonal.min())
    if not least > 0:
        raise ValueError(
            f"Expected a positive diagonal for `{name}`, got weight decay + damping = {least:.3g}: the {kind} alone is "
            "probably singular. Pass a positive `damping=`, or None to choose it by the fit's learning rates."
        )
    return least
