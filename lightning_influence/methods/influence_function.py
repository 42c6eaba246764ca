"""Influence functions: the effect of leaving an example out, by the inverse curvature (Koh and Liang, 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_not_empty, one_of
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.curvature.damping import Diagonal, diagonal_at, of_group
from lightning_influence.curvature.exact import Exact
from lightning_influence.curvature.iterative import Iterative
from lightning_influence.curvature.leverage import seconds_of_leverage
from lightning_influence.curvature.newton_correction import NewtonCorrection
from lightning_influence.curvature.preconditioner import refuse_maximising
from lightning_influence.curvature.stand_in import StandIn
from lightning_influence.curvature.store import prepared_at, preparing
from lightning_influence.curvature.unit import why_arbitrary
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.products import Products
from lightning_influence.gradients.queries import DenseQueries, EachQuery, QueryGradients
from lightning_influence.methods.kinds import GradientProduct, TrainBlock
from lightning_influence.setting.checkpoints import stage_positions
from lightning_influence.setting.samples import Samples
from lightning_influence.setting.setting import Queries, Setting, Stage, cached
from lightning_influence.timing import Work, seconds_of
from lightning_influence.trajectory import Trajectory


@dataclass(frozen=True)
class InfluenceFunction(GradientProduct):
    r"""How much higher a query's loss would be if the optimum were found without the example, to first order.

    .. math:: s(q, z_i) = \frac{1}{n} \nabla\ell(w, q)^\top (C + \lambda + \delta)^{-1} \nabla\ell(w, z_i)

    with C the curvature of the mean training loss, :math:`\lambda` the fit's L2 weight decay and :math:`\delta` the
    curvature's damping (see ``Curvature``), both per parameter group. Where a batch's loss is a mean over tokens (or
    class weights), the training loss is the mean over the tokens of all examples, and 1/n is the example's share.

    Source: Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017. ``normalize``:
    Barshan, Brunet, Dziugaite. RelatIF. AISTATS 2020. ``correction="newton"``: one Newton step without the example, as
    in Rubinstein and Hopkins, Rescaled Influence Functions, 2025. Second order of groups: Basu, You, Feizi. On
    Second-Order Group Influence Functions. ICML 2020.
    Needs: the final weights. Learning rates and weight decay are read from the trajectory if there is one.
    Units: query loss where the damping follows the length of the fit and the fit has not memorised its examples;
    otherwise, and with ``normalize``, arbitrary, which the notes explain.
    Cost: preparing the curvature once, one solve per query, and one backward pass per example. Self-influence: one
    solve per example; with ``EKFAC`` about as much as a second backward pass.

    Args:
        curvature: how the inverse is computed, such as ``EKFAC()``.
        removal: the training loss without the example, to which the weight decay is added. ``"downweight"``: the sum of
            the others' losses, still divided by n; ``"renormalize"``: divided by n - 1.
        correction: ``"newton"``: also remove the example's own curvature. For models that are linear in the parameters
            whose gradients are used (one linear layer before the loss), with ``ExactGGN`` or ``ExactHessian``.
        normalize: ``"relatif"``: divide by the norm of the change of weights when the example is left out, times n;
            ``"relatif-loss"``: divide by the square root of the example's self-influence, times n.
        checkpoints: positions in the trajectory, whose scores are averaged; None: the final weights.

    Raises:
        TypeError: ``curvature`` is not a ``Curvature``.
        ValueError: other values; ``correction="newton"`` for a model that is not linear; ``maximize=True``.
        MissingEvidence: ``checkpoints`` without a trajectory.
    """

    curvature: Curvature
    removal: Literal["downweight", "renormalize"] = "downweight"
    correction: Literal["newton"] | None = None
    normalize: Literal["relatif", "relatif-loss"] | None = None
    checkpoints: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.curvature, Curvature):
            kind = getattr(self.curvature, "__name__", "EKFAC")
            raise TypeError(
                f"Expected `curvature` to be a Curvature such as `EKFAC()`, got {self.curvature!r}. Write "
                f"`InfluenceFunction({kind}())`."
            )
        one_of("removal", self.removal, ("downweight", "renormalize"))
        one_of("correction", self.correction, (None, "newton"))
        check_not_empty("checkpoints", self.checkpoints)
        one_of("normalize", self.normalize, (None, "relatif", "relatif-loss"))
        if self.correction and not isinstance(self.curvature, Exact):
            raise ValueError(
                f"Expected `ExactGGN()` or `ExactHessian()` with `correction='newton'`, got {self.curvature!r}: the "
                "correction needs the exact inverse."
            )
        if self.normalize and (self.correction or self.removal != "downweight"):
            raise ValueError(
                f"Expected `correction=None` and `removal='downweight'` with `normalize={self.normalize!r}`, got "
                f"{self.correction!r} and {self.removal!r}."
            )

    # ---- scores -------------------------------------------------------------------------------------------------

    def query_side(self, stage: Stage, queries: Queries) -> QueryGradients:
        """The queries' directions (inverse curvature × gradient), which are solved for once for all tiles."""
        return _Inverse(self, stage).directions(queries)

    def product(self, stage: Stage, query: QueryGradients, block: TrainBlock) -> Tensor:
        """Products with the directions, divided by n or by RelatIF's norms, [query, example]."""
        inverse = _Inverse(self, stage)
        product = query.dot(inverse.corrected(block.gradients, block.ids))
        if self.removal == "renormalize":
            product = product + query.times(inverse.decayed())[:, None]
        return product / inverse.norms(block) if self.normalize else self._share(stage, block.ids, product)

    def _share(self, stage: Stage, ids: Sequence[int], product: Tensor) -> Tensor:
        """Products times the examples' weights in the training loss: 1 / n, or with a mean over tokens their share."""
        weights = stage.setting.engine.weights_of(ids)
        return (product if weights is None else product * weights.to(product)) / stage.setting.n_train

    def product_with_itself(self, stage: Stage, block: TrainBlock) -> Tensor:
        """The same with each example as its own query, [example]."""
        return _Inverse(self, stage).on_itself(block)

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """The mean over the checkpoints, [query, train]."""
        return super().score(setting, queries) / self._visited(setting)

    def self_influence(self, setting: Setting) -> Tensor:
        """The mean over the checkpoints, [train]."""
        return super().self_influence(setting) / self._visited(setting)

    def group(self, setting: Setting, queries: Queries, ids: Sequence[int]) -> Tensor | None:
        """The joint influence to second order, [query]; None for curvatures and options that do not offer it."""
        plain = not self.correction and not self.normalize and self.removal == "downweight"
        if not plain or not isinstance(self.curvature, (Exact, Iterative)):
            return None
        total = torch.zeros(len(queries), dtype=torch.float64)
        for stage in self.stages(setting):
            change = _Inverse(self, stage).group_change(tuple(ids))
            total += stage.gradients(queries).times(change).cpu().double()
        return total / self._visited(setting)

    # ---- the record ---------------------------------------------------------------------------------------------

    def queries_at_once(self, setting: Setting) -> int | None:
        """As many as the curvature can solve for at once."""
        return self.curvature.at_once(setting)

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """Preparing the curvature and solving; products with what stands for the solutions."""
        prepared = preparing(self.curvature, setting, self.stages(setting))
        stage, visited = next(self.stages(setting)), self._visited(setting)
        method = replace(self, curvature=StandIn.at(self.curvature, setting, stage), correction=None)
        unit = seconds_of(lambda: _Inverse(method, stage)) + seconds_of_leverage(self.curvature, setting)
        products = super(InfluenceFunction, method).work(setting, queries)
        own = setting.n_train if queries is None or self.normalize else 0
        solved = self.curvature.seconds_of_solving(setting, own + (0 if queries is None else len(queries)))
        pieces = [*prepared, Work("damping and unit", visited, unit), Work("solving", visited, solved), *products]
        if self.normalize and queries is not None:
            inverse = _Inverse(method, next(method.stages(setting)))
            norms = Samples.of(setting).with_gradients(lambda gradients: inverse._own_products(gradients, (2,)))
            pieces.append(Work("norms", visited * setting.n_train, norms))
        return pieces

    def positions(self, trajectory: Trajectory | None) -> list[int]:
        """The given ``checkpoints``, or only the last."""
        if self.checkpoints is None:
            return super().positions(trajectory)
        return stage_positions(trajectory, self.checkpoints)

    def unit(self, setting: Setting) -> str:
        """Loss; arbitrary with ``normalize``, or where a removal's effect is far from the scores (see the notes)."""
        found = setting.state(self, _Solved).units
        return "loss" if found and set(found.values()) == {"loss"} and not self.normalize else "arbitrary"


@dataclass
class _Solved:
    """What is kept for later tiles and blocks of queries; all by the position of the checkpoint.

    Args:
        diagonals: what is added to the curvature's diagonal.
        units: of the scores.
        corrections: for ``correction="newton"``.
        norms: what RelatIF divides by, by block of training examples too.
        changes: changes of the weights when a group is left out, by group too.
        queries: the block of queries that ``directions`` belongs to.
        directions: of these queries.
    """

    diagonals: dict[int | None, Diagonal] = field(default_factory=dict)
    units: dict[int | None, str] = field(default_factory=dict)
    corrections: dict[int | None, NewtonCorrection] = field(default_factory=dict)
    norms: dict[tuple[int | None, range], Tensor] = field(default_factory=dict)
    changes: dict[tuple[int | None, tuple[int, ...]], dict[str, Tensor]] = field(default_factory=dict)
    queries: Queries | None = None
    directions: dict[int | None, QueryGradients] = field(default_factory=dict)


class _Inverse:
    """The inverse curvature at one stage, with what influence functions compute from it."""

    def __init__(self, method: InfluenceFunction, stage: Stage) -> None:
        self.method, self.setting, self.stage = method, stage.setting, stage
        self.curvature = method.curvature
        refuse_maximising(self.setting.trajectory)
        self.prepared = prepared_at(self.curvature, self.setting, stage)
        self.kept = self.setting.state(method, _Solved)
        self.diagonal = cached(self.kept.diagonals, stage.position, self._diagonal)
        if not method.normalize:
            cached(self.kept.units, stage.position, self._unit)

    def _diagonal(self) -> Diagonal:
        setting, curvature = self.setting, self.curvature
        mean = partial(curvature.mean_eigenvalue, self.prepared, setting)
        found = diagonal_at(setting, self.stage, curvature.damping, mean, curvature.share)
        setting.diagnostic("damping", float(found.damping.max()))
        setting.diagnostic("weight_decay", float(found.decay.max()))
        shown = ", ".join(f"{value:.3g}" for value in found.damping.tolist())
        decay = ", ".join(f"{value:.3g}" for value in found.decay.tolist())
        setting.note(f"Damping {shown} ({found.reason}), beside an L2 weight decay of {decay}")
        return found

    def _unit(self) -> str:
        """Loss or arbitrary, and a note why."""
        corrected = self.method.correction is not None
        why = why_arbitrary(self.curvature, self.prepared, self.setting, self.diagonal, corrected)
        if why is not None:
            self.setting.note(f"The unit of the scores is arbitrary: {why}")
        return "loss" if why is None else "arbitrary"

    @property
    def total(self) -> Tensor:
        """What is added to the curvature's diagonal, [group]."""
        n = self.setting.n_train
        if self.method.correction and self.method.removal == "renormalize":
            # C is divided by n, the loss without the example by n - 1.
            return self.diagonal.decay * (n - 1) / n + self.diagonal.damping
        return self.diagonal.total

    def directions(self, queries: Queries) -> QueryGradients:
        """The directions of the queries, from the cache if they were solved for before."""
        if self.kept.queries is not queries:
            self.kept.queries, self.kept.directions = queries, {}
        return cached(self.kept.directions, self.stage.position, lambda: self.solve(self.stage.gradients(queries)))

    def solve(self, queries: QueryGradients) -> QueryGradients:
        """The inverse curvature times the queries' gradients."""
        return self.curvature.solve(self.prepared, queries, self.setting, self.total)

    def decayed(self) -> dict[str, Tensor]:
        """The gradient of the L2 penalty."""
        engine = self.setting.engine
        parameters, decay = engine.task.named_parameters(), of_group(self.diagonal.decay, engine.groups)
        return {name: decay(name) * parameters[name].detach() for name in engine.plan.names}

    def corrected(self, gradients: Gradients, ids: range) -> Gradients:
        """The training gradients to be multiplied with directions, after ``correction="newton"`` if there is one."""
        if not self.method.correction:
            return gradients
        correction = cached(self.kept.corrections, self.stage.position, self._correction)
        return correction.corrected(gradients, ids)

    def _correction(self) -> NewtonCorrection:
        curvature = self.curvature
        assert isinstance(curvature, Exact)
        if self.setting.engine.weights is not None and self.method.removal == "renormalize":
            raise ValueError(
                "Expected `removal='downweight'` with `correction='newton'` for a mean over tokens or class weights, "
                "got 'renormalize': each example would change the divisor by another number. Leave one of them out."
            )
        factor = curvature.factor(self.prepared, self.setting, self.total)
        shift = self.decayed() if self.method.removal == "renormalize" else None
        return NewtonCorrection(self.setting.engine, self.setting.examples, factor, shift)

    def norms(self, block: TrainBlock) -> Tensor:
        """What RelatIF divides by, [example]; computed once for all queries."""
        power = 2 if self.method.normalize == "relatif" else 1
        key = self.stage.position, block.ids
        return cached(self.kept.norms, key, lambda: _length(self._own_products(block.gradients, (power,))[0]))

    def on_itself(self, block: TrainBlock) -> Tensor:
        """Self-influence of a block's examples, [example]."""
        if self.method.normalize:
            own = self._own_products(block.gradients, (1, 2) if self.method.normalize == "relatif" else (1,))
            return own[0] / _length(own[-1])
        own = self._corrected_products(block) if self.method.correction else self._own_products(block.gradients)[0]
        if self.method.removal == "renormalize":
            own = own + block.gradients.times(self._decay_direction())
        return self.method._share(self.stage, block.ids, own)

    def _own_products(self, gradients: Gradients, powers: Sequence[int] = (1,)) -> Tensor:
        return self.curvature.own_products(self.prepared, gradients, self.setting, self.total, powers)

    def _corrected_products(self, block: TrainBlock) -> Tensor:
        """Products of each gradient's direction with the same gradient after ``correction="newton"``, [example]."""
        step, found = self.curvature.at_once(self.setting) or len(block.ids), []
        for start in range(0, len(block.ids), step):
            piece, ids = block.gradients.slice(slice(start, start + step)), block.ids[start : start + step]
            found.append(self.solve(EachQuery([piece])).diagonal(self.corrected(piece, ids)))
        return torch.cat(found)

    def _decay_direction(self) -> dict[str, Tensor]:
        """The inverse curvature times the gradient of the L2 penalty."""
        vectors = {name: vector[None] for name, vector in self.decayed().items()}
        solved = self.solve(DenseQueries(vectors, self.setting.engine.groups)).dense()
        return {name: found[0] for name, found in solved.items()}

    def group_change(self, ids: tuple[int, ...]) -> dict[str, Tensor]:
        r"""The change of the weights without a group S, :math:`A^{-1} (I + H_S A^{-1} / n) g_S / n`; A is damped C."""
        return cached(self.kept.changes, (self.stage.position, ids), lambda: self._group_change(ids))

    def _group_change(self, ids: Sequence[int]) -> dict[str, Tensor]:
        products, n = Products(self.setting.engine, self.setting.examples), self.setting.n_train
        first = self._flat_solve(products, products.gradient(ids) / n)
        moved = products.times(self.curvature.matrix, first, ids) / n  # type: ignore[attr-defined]
        products.check()
        second = self._flat_solve(products, moved)
        return {name: change[0] for name, change in products.flat.split(first + second).items()}

    def _flat_solve(self, products: Products, vectors: Tensor) -> Tensor:
        solved = self.solve(DenseQueries(products.flat.split(vectors), self.setting.engine.groups))
        return products.flat.join(solved.dense(), len(vectors), products.like)


def _length(squares: Tensor) -> Tensor:
    """The roots of squared norms; infinity for 0, whose gradients are 0 as well."""
    return torch.where(squares > 0, squares, torch.inf).sqrt()
