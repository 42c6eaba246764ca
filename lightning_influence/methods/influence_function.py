"""Influence functions: what leaving an example out would do, through the inverse of the loss's curvature."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_influence.checks import one_of
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.curvature.damping import Diagonal, diagonal_at, of_group
from lightning_influence.curvature.exact import Exact
from lightning_influence.curvature.iterative import Iterative
from lightning_influence.curvature.newton_correction import NewtonCorrection
from lightning_influence.curvature.store import prepared_at
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.products import Products
from lightning_influence.gradients.queries import DenseQueries, EachQuery, QueryGradients
from lightning_influence.methods.kinds import GradientProduct, TrainBlock
from lightning_influence.methods.method import Evidence
from lightning_influence.setting.setting import Queries, Setting, Stage, cached, stage_positions
from lightning_influence.trajectory import Trajectory


@dataclass(frozen=True)
class InfluenceFunction(GradientProduct):
    r"""How much higher a query's loss would be, had the optimum been found without the example.

    .. math:: s(q, z_i) = \frac{1}{n} \nabla\ell(w, q)^\top (C + \lambda + \delta)^{-1} \nabla\ell(w, z_i)

    with C the curvature of the mean training loss, :math:`\lambda` the fit's L2 weight decay and :math:`\delta` the
    curvature's damping (see ``Curvature``), both by parameter group.

    Source: Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017. ``normalize``:
    Barshan, Brunet, Dziugaite. RelatIF. AISTATS 2020. ``correction="newton"``: one Newton step without the example, as
    in Rubinstein and Hopkins, Rescaled Influence Functions, 2025. Second order of groups: Basu, You, Feizi. On
    Second-Order Group Influence Functions. ICML 2020.
    Needs: the final weights; learning rates and weight decay are taken from the trajectory where there is one.
    Units: query loss (what leaving the example out adds to it); arbitrary with ``normalize``.
    Cost: preparing the curvature once, a solve for each query, one backward pass an example.

    Args:
        curvature: how the inverse is computed.
        removal: ``"downweight"``: the example's weight goes to 0 and the divisor n stays, so that beside the rest the
            weight decay keeps its strength; ``"renormalize"``: the mean over the n - 1 others, beside which the
            weight decay keeps its coefficient.
        correction: ``"newton"`` also takes the example's own curvature away, for models that are linear in the
            parameters that count (one linear layer before the loss) and ``ExactGGN`` or ``ExactHessian``.
        normalize: ``"relatif"``: over the length of the change of weights that leaving the example out makes,
            times n; ``"relatif-loss"``: over the square root of its self-influence, times n.
        checkpoints: positions among the trajectory's checkpoints whose scores are averaged; None: the final weights.

    Raises:
        TypeError: ``curvature`` is none.
        ValueError: other values; a model that is not linear under ``correction="newton"``.
        MissingEvidence: ``checkpoints`` without a trajectory.
    """

    curvature: Curvature
    removal: Literal["downweight", "renormalize"] = "downweight"
    correction: Literal["newton"] | None = None
    normalize: Literal["relatif", "relatif-loss"] | None = None
    checkpoints: tuple[int, ...] | None = None
    needs: ClassVar[Evidence] = Evidence.FINAL_WEIGHTS

    def __post_init__(self) -> None:
        if not isinstance(self.curvature, Curvature):
            raise TypeError(f"Expected `curvature` to be a Curvature such as `EKFAC()`, got {self.curvature!r}.")
        one_of("removal", self.removal, ("downweight", "renormalize"))
        one_of("correction", self.correction, (None, "newton"))
        one_of("normalize", self.normalize, (None, "relatif", "relatif-loss"))
        if self.correction and not isinstance(self.curvature, Exact):
            raise ValueError(
                f"Expected `ExactGGN()` or `ExactHessian()` with `correction='newton'`, got {self.curvature!r}: the "
                "correction reads blocks of the inverse."
            )
        if self.normalize and (self.correction or self.removal != "downweight"):
            raise ValueError(
                f"Expected `correction=None` and `removal='downweight'` with `normalize={self.normalize!r}`, got "
                f"{self.correction!r} and {self.removal!r}."
            )

    # ---- scores -------------------------------------------------------------------------------------------------

    def query_side(self, stage: Stage, queries: Queries) -> QueryGradients:
        """The queries' directions, solved for once whatever the number of tiles."""
        return _Inverse(self, stage).directions(queries)

    def product(self, stage: Stage, query: QueryGradients, block: TrainBlock) -> Tensor:
        """[query, example]."""
        inverse = _Inverse(self, stage)
        product = query.dot(inverse.corrected(block.gradients, block.ids))
        if self.removal == "renormalize":
            product = product + query.times(inverse.decayed())[:, None]
        return product / inverse.lengths(block) if self.normalize else product / stage.setting.n_train

    def product_with_itself(self, stage: Stage, block: TrainBlock) -> Tensor:
        """[example]: the same with the example as its own query."""
        return torch.cat(list(_Inverse(self, stage).on_itself(block)))

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]: the mean over the checkpoints."""
        return super().score(setting, queries) / max(1, len(self.positions(setting.trajectory)))

    def self_influence(self, setting: Setting) -> Tensor:
        """[train]: the mean over the checkpoints."""
        return super().self_influence(setting) / max(1, len(self.positions(setting.trajectory)))

    def group(self, setting: Setting, queries: Queries, ids: Sequence[int]) -> Tensor | None:
        """[query]: to second order in the group, where the curvature gives products; None: the sum."""
        plain = not self.correction and not self.normalize and self.removal == "downweight"
        if not plain or not isinstance(self.curvature, (Exact, Iterative)):
            return None
        total, stages = torch.zeros(len(queries), dtype=torch.float64), 0
        for stage in self.stages(setting):
            stages += 1
            change = _Inverse(self, stage).group_change(tuple(ids))
            total += stage.gradients(queries).times(change).double().cpu()
        return total / stages

    # ---- the record ---------------------------------------------------------------------------------------------

    def queries_at_once(self, setting: Setting) -> int | None:
        """As many as the curvature solves together."""
        return self.curvature.at_once(setting)

    def preparation_seconds(self, setting: Setting, vectors: int) -> float:
        """Preparing the curvature and solving for every query (for every training example where lengths are taken)."""
        return self.curvature.seconds(setting, vectors + (setting.n_train if self.normalize else 0))

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """The last, or the given ones."""
        if self.checkpoints is None:
            return super().positions(trajectory)
        return stage_positions(trajectory, self.checkpoints)

    def unit(self, setting: Setting) -> str:
        """Loss, unless normalised."""
        return "arbitrary" if self.normalize else "loss"

    def hyperparameters(self) -> dict[str, Any]:
        """Those of the curvature too, with its name."""
        own = {f.name: getattr(self.curvature, f.name) for f in fields(self.curvature)}
        return super().hyperparameters() | {"curvature": {"name": type(self.curvature).__name__, **own}}


@dataclass
class _Solved:
    """What is kept from one tile and block of queries to the next; checkpoints by position.

    Args:
        diagonals: added to the curvature.
        corrections: of ``correction="newton"``.
        lengths: what RelatIF divides by, by checkpoint and training examples.
        changes: of the weights when a group is left out, by checkpoint and group.
        queries: those that ``directions`` are of.
        directions: of these queries.
    """

    diagonals: dict[int | None, Diagonal] = field(default_factory=dict)
    corrections: dict[int | None, NewtonCorrection] = field(default_factory=dict)
    lengths: dict[tuple[int | None, range], Tensor] = field(default_factory=dict)
    changes: dict[tuple[int | None, tuple[int, ...]], dict[str, Tensor]] = field(default_factory=dict)
    queries: Queries | None = None
    directions: dict[int | None, QueryGradients] = field(default_factory=dict)


class _Inverse:
    """The inverse at one stage, as influence functions use it."""

    def __init__(self, method: InfluenceFunction, stage: Stage) -> None:
        self.method, self.setting, self.stage = method, stage.setting, stage
        self.curvature = method.curvature
        self.prepared = prepared_at(self.curvature, self.setting, stage)
        self.kept = self.setting.state(method, _Solved)
        self.diagonal = cached(self.kept.diagonals, stage.position, self._diagonal)

    def _diagonal(self) -> Diagonal:
        setting, curvature = self.setting, self.curvature

        def mean() -> float:
            return curvature.mean_eigenvalue(self.prepared, setting)

        found = diagonal_at(setting, self.stage, curvature.damping, mean, curvature.share)
        for note in self.prepared.notes:
            setting.note(note)
        setting.diagnostic("damping", float(found.damping.max()))
        setting.diagnostic("weight_decay", float(found.decay.max()))
        shown = ", ".join(f"{value:.3g}" for value in found.damping.tolist())
        decay = ", ".join(f"{value:.3g}" for value in found.decay.tolist())
        setting.note(f"Damping {shown} ({found.reason}), beside an L2 weight decay of {decay}")
        return found

    @property
    def total(self) -> Tensor:
        """[group]: what is added to the curvature's diagonal."""
        n = self.setting.n_train
        if self.method.correction and self.method.removal == "renormalize":
            return self.diagonal.decay * (n - 1) / n + self.diagonal.damping  # beside n - 1 examples
        return self.diagonal.total

    def directions(self, queries: Queries) -> QueryGradients:
        """Of the queries' gradients."""
        if self.kept.queries is not queries:
            self.kept.queries, self.kept.directions = queries, {}
        return cached(self.kept.directions, self.stage.position, lambda: self.solve(self.stage.gradients(queries)))

    def solve(self, queries: QueryGradients) -> QueryGradients:
        """The directions of some queries."""
        return self.curvature.solve(self.prepared, queries, self.setting, self.total)

    def decayed(self) -> dict[str, Tensor]:
        """The gradient of the L2 penalty."""
        engine = self.setting.engine
        parameters, decay = engine.task.named_parameters(), of_group(self.diagonal.decay, engine.groups)
        return {name: decay(name) * parameters[name].detach() for name in engine.plan.names}

    def corrected(self, gradients: Gradients, ids: range) -> Gradients:
        """The training gradients whose products with the directions are wanted."""
        if not self.method.correction:
            return gradients
        correction = cached(self.kept.corrections, self.stage.position, self._correction)
        return correction.corrected(gradients, ids)

    def _correction(self) -> NewtonCorrection:
        curvature = self.curvature
        assert isinstance(curvature, Exact)
        factor = curvature.factor(self.prepared, self.setting, self.total)
        shift = self.decayed() if self.method.removal == "renormalize" else None
        return NewtonCorrection(self.setting.engine, self.setting.examples, factor, shift)

    def lengths(self, block: TrainBlock) -> Tensor:
        """[example]: what RelatIF divides by, computed once for all queries."""
        return cached(
            self.kept.lengths,
            (self.stage.position, block.ids),
            lambda: torch.cat([self._length(solved, piece) for solved, piece, _ in self._own_directions(block)]),
        )

    def on_itself(self, block: TrainBlock) -> Iterator[Tensor]:
        """Self-influence of a block's examples, in pieces."""
        for solved, piece, ids in self._own_directions(block):
            own = solved.diagonal(self.corrected(piece, ids))
            if self.method.removal == "renormalize":
                own = own + solved.times(self.decayed())
            yield own / (self._length(solved, piece) if self.method.normalize else self.setting.n_train)

    def _length(self, solved: QueryGradients, piece: Gradients) -> Tensor:
        squares = solved.norm2() if self.method.normalize == "relatif" else solved.diagonal(piece)
        return torch.where(squares > 0, squares, torch.inf).sqrt()

    def _own_directions(self, block: TrainBlock) -> Iterator[tuple[QueryGradients, Gradients, range]]:
        """The directions of a block's own gradients, as many at once as fit."""
        step = self.curvature.at_once(self.setting) or len(block.ids)
        for start in range(0, len(block.ids), step):
            piece = block.gradients.slice(slice(start, start + step))
            yield self.solve(EachQuery([piece])), piece, block.ids[start : start + step]

    def group_change(self, ids: tuple[int, ...]) -> dict[str, Tensor]:
        r"""The change of weights when a group is left out: :math:`A^{-1} (I + H_S A^{-1} / n) g_S / n`."""
        return cached(self.kept.changes, (self.stage.position, ids), lambda: self._group_change(ids))

    def _group_change(self, ids: Sequence[int]) -> dict[str, Tensor]:
        products, n = Products(self.setting.engine, self.setting.examples), self.setting.n_train
        matrix = self.curvature.matrix  # type: ignore[attr-defined]
        first = self._flat_solve(products, products.gradient(ids) / n)
        second = self._flat_solve(products, products.times(matrix, first, ids) / n)
        return {name: change[0] for name, change in products.flat.split(first + second).items()}

    def _flat_solve(self, products: Products, vectors: Tensor) -> Tensor:
        solved = self.solve(DenseQueries(products.flat.split(vectors), self.setting.engine.groups))
        return products.flat.join(solved.dense(), len(vectors), products.like)
