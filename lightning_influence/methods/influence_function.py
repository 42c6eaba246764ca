"""Influence functions: what leaving an example out would do, through the inverse of the loss's curvature."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
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
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.setting.setting import Queries, Setting, Stage, stage_positions
from lightning_influence.trajectory import Trajectory


@dataclass(frozen=True)
class InfluenceFunction(Method):
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

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]."""
        total, stages = setting.zeros(queries), 0
        for stage in self._stages(setting):
            stages += 1
            inverse = _Inverse(self, setting, stage)
            solved = queries.once((self, stage.position), lambda: inverse.solve(stage.gradients(queries)))  # noqa: B023
            for columns, block in stage.train():
                product = solved.dot(inverse.corrected(block, columns.start))
                if self.removal == "renormalize":
                    product = product + solved.times(inverse.decayed())[:, None]
                if self.normalize:
                    product = product / inverse.lengths(block, columns.start)
                total[:, columns] += product / (1 if self.normalize else setting.n_train)
        return total / stages

    def self_influence(self, setting: Setting) -> Tensor:
        """[train]: the same with the example as its own query."""
        total, stages = setting.zeros(), 0
        for stage in self._stages(setting):
            stages += 1
            inverse = _Inverse(self, setting, stage)
            for columns, block in stage.train():
                total[columns] += torch.cat(list(inverse.on_itself(block, columns.start)))
        return total / stages

    def group(self, setting: Setting, queries: Queries, ids: Sequence[int]) -> Tensor | None:
        """[query]: to second order in the group, where the curvature gives products; None: the sum."""
        plain = not self.correction and not self.normalize and self.removal == "downweight"
        if not plain or not isinstance(self.curvature, (Exact, Iterative)):
            return None
        total, stages = torch.zeros(len(queries), dtype=torch.float64), 0
        for stage in self._stages(setting):
            stages += 1
            inverse = _Inverse(self, setting, stage)
            change = setting.once((self, "group", stage.position, tuple(ids)), lambda: inverse.group_change(ids))  # noqa: B023
            total += stage.gradients(queries).times(change).double().cpu()
        return total / stages

    def _stages(self, setting: Setting) -> Iterator[Stage]:
        if self.checkpoints is None:
            yield setting.final()
        else:
            yield from setting.stages(self.checkpoints)

    # ---- the record ---------------------------------------------------------------------------------------------

    def at_once(self, setting: Setting) -> int | None:
        """As many as the curvature solves together."""
        return self.curvature.at_once(setting)

    def overhead(self, setting: Setting, queries: int) -> float:
        """Preparing the curvature and solving for every query (for every training example where lengths are taken)."""
        return self.curvature.seconds(setting, queries + (setting.n_train if self.normalize else 0))

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """The last, or the given ones."""
        if self.checkpoints is None:
            return super().positions(trajectory)
        return stage_positions(trajectory, self.checkpoints)

    def unit(self, setting: Setting) -> str:
        """Loss, unless normalised."""
        return "arbitrary" if self.normalize else "loss"

    def settings(self) -> dict[str, Any]:
        """The curvature by its name and its own settings."""
        own = {f.name: getattr(self.curvature, f.name) for f in fields(self.curvature)}
        return super().settings() | {"curvature": {"name": type(self.curvature).__name__, **own}}


class _Inverse:
    """The inverse at one stage, as influence functions use it."""

    def __init__(self, method: InfluenceFunction, setting: Setting, stage: Stage) -> None:
        self.method, self.setting, self.stage = method, setting, stage
        self.curvature = method.curvature
        self.prepared = prepared_at(self.curvature, setting, stage)
        self.diagonal = setting.once((method, "diagonal", stage.position), self._diagonal)

    def _diagonal(self) -> Diagonal:
        setting, curvature = self.setting, self.curvature

        def mean() -> float:
            return curvature.mean_eigenvalue(self.prepared, setting)

        found = diagonal_at(setting, self.stage, curvature.damping, mean, curvature.share)
        for note in self.prepared.notes:
            setting.note(note)
        setting.figure("damping", float(found.damping.max()))
        setting.figure("weight_decay", float(found.decay.max()))
        shown = ", ".join(f"{value:.3g}" for value in found.damping.tolist())
        decay = ", ".join(f"{value:.3g}" for value in found.decay.tolist())
        setting.note(f"Damping {shown} ({found.why}), beside an L2 weight decay of {decay}")
        return found

    @property
    def total(self) -> Tensor:
        """[group]: what is added to the curvature's diagonal."""
        n = self.setting.n_train
        if self.method.correction and self.method.removal == "renormalize":
            return self.diagonal.decay * (n - 1) / n + self.diagonal.damping  # beside n - 1 examples
        return self.diagonal.total

    def solve(self, queries: QueryGradients) -> QueryGradients:
        """The directions of some queries."""
        return self.curvature.solve(self.prepared, queries, self.setting, self.total)

    def decayed(self) -> dict[str, Tensor]:
        """The gradient of the L2 penalty."""
        engine = self.setting.engine
        parameters, decay = engine.task.named_parameters(), of_group(self.diagonal.decay, engine.groups)
        return {name: decay(name) * parameters[name].detach() for name in engine.plan.names}

    def corrected(self, block: Gradients, first: int) -> Gradients:
        """The gradients whose products with the directions are wanted; ``first``: of the tile, that of the block."""
        if not self.method.correction:
            return block
        start = self.setting.ids.start + first
        key = (self.method, "leverage", self.stage.position)
        return self.setting.once(key, self._leverage).corrected(block, range(start, start + len(block)))

    def _leverage(self) -> NewtonCorrection:
        curvature = self.curvature
        assert isinstance(curvature, Exact)
        factor = curvature.factor(self.prepared, self.setting, self.total)
        shift = self.decayed() if self.method.removal == "renormalize" else None
        return NewtonCorrection(self.setting.engine, self.setting.examples, factor, shift)

    def lengths(self, block: Gradients, first: int) -> Tensor:
        """[example]: what RelatIF divides by, computed once for all queries."""
        key = (self.method, "lengths", self.stage.position, self.setting.ids.start + first, len(block))
        return self.setting.once(
            key, lambda: torch.cat([self._length(solved, piece) for solved, piece, _ in self._directions(block)])
        )

    def on_itself(self, block: Gradients, first: int) -> Iterator[Tensor]:
        """Self-influence of a block's examples, in pieces."""
        for solved, piece, start in self._directions(block):
            own = solved.diagonal(self.corrected(piece, first + start))
            if self.method.removal == "renormalize":
                own = own + solved.times(self.decayed())
            yield own / (self._length(solved, piece) if self.method.normalize else self.setting.n_train)

    def _length(self, solved: QueryGradients, piece: Gradients) -> Tensor:
        squares = solved.norm2() if self.method.normalize == "relatif" else solved.diagonal(piece)
        return torch.where(squares > 0, squares, torch.inf).sqrt()

    def _directions(self, block: Gradients) -> Iterator[tuple[QueryGradients, Gradients, int]]:
        """The directions of a block's own gradients, as many at once as fit."""
        step = self.curvature.at_once(self.setting) or len(block)
        for start in range(0, len(block), step):
            piece = block.slice(slice(start, start + step))
            yield self.solve(EachQuery([piece])), piece, start

    def group_change(self, ids: Sequence[int]) -> dict[str, Tensor]:
        r"""The change of weights when a group leaves: :math:`A^{-1} (I + H_S A^{-1} / n) g_S / n`."""
        products, n = Products(self.setting.engine, self.setting.examples), self.setting.n_train
        matrix = self.curvature.matrix  # type: ignore[attr-defined]
        first = self._flat_solve(products, products.gradient(ids) / n)
        second = self._flat_solve(products, products.times(matrix, first, ids) / n)
        return {name: change[0] for name, change in products.flat.split(first + second).items()}

    def _flat_solve(self, products: Products, vectors: Tensor) -> Tensor:
        solved = self.solve(DenseQueries(products.flat.split(vectors), self.setting.engine.groups))
        return products.flat.join(solved.dense(), len(vectors), products.like)
