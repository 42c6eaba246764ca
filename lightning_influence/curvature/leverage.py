"""How much of their own fit a few training examples carry: where it is much, scores understate a removal's effect."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.curvature.curvature import Curvature, PreparedCurvature
from lightning_influence.curvature.fisher_samples import head_of
from lightning_influence.curvature.iterative import Iterative
from lightning_influence.gradients.losses import Losses
from lightning_influence.gradients.queries import EachQuery, QueryGradients
from lightning_influence.module.snapshot import readings_of
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.setting.setting import Setting

# Examples that are solved for, and with a solver that iterates.
_EXAMPLES, _FEWER = 64, 16
# A tenth is enough here, which takes a few iterations where scores take fifty.
_TOLERANCE, _ITERATIONS = 0.1, 20


@dataclass(frozen=True, eq=False)
class OwnInfluence:
    """Self-influences of a few training examples, evenly spread over the data, and what they tell about all scores.

    Args:
        own: by the diagonal that the fit implies, [example].
        used: by the diagonal of the scores, [example].
        losses: of the examples, [example].
        squared: whether the loss is a squared error.
    """

    own: Tensor
    used: Tensor
    losses: Tensor
    squared: bool

    @property
    def inflation(self) -> float:
        """How many times larger the scores' diagonal makes them; it may be a share of the fit's that ranks better."""
        return float(self.used.nansum() / self.own.nansum())

    @property
    def leverage(self) -> float:
        """The mean leverage, weighted with self-influence."""
        return weighted_leverage(self.own, self.losses, self.squared)


def own_influence(
    curvature: Curvature, prepared: PreparedCurvature, setting: Setting, implied: Tensor, used: Tensor
) -> OwnInfluence:
    """Solve for a few training examples by the diagonal [group] that the fit implies, and by that of the scores."""
    count = min(_FEWER if isinstance(curvature, Iterative) else _EXAMPLES, setting.n_train)
    ids = evenly_spread(setting.n_train, count)
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
    losses_of, step = Losses(), max(1, min(setting.examples.block_size, curvature.at_once(setting) or count))
    for start in range(0, len(ids), step):
        chosen = ids[start : start + step]
        block = setting.examples.chosen(chosen)
        gradients = setting.engine.gradients(block, again=setting.examples.chosen)
        weights = setting.engine.weights_of(chosen)
        for products, diagonal in zip(found, (implied, used), strict=False):
            if products is found[1] and bool((implied == used).all()):
                products.append(found[0][-1])
                continue
            each = _solved(curvature, prepared, EachQuery([gradients]), setting, diagonal).diagonal(gradients)
            products.append(each if weights is None else each * weights.to(each))
        found[2].append(losses_of(setting.engine, block))
    reads = [readings_of(setting.engine.task.module).arriving(torch.cat(of_kind)) for of_kind in found]
    setting.engine.read_checks()
    own, other, losses = (read().double() for read in reads)
    return OwnInfluence(own / setting.n_train, other / setting.n_train, losses, _is_squared(setting))


def seconds_of_leverage(curvature: Curvature, setting: Setting) -> float:
    """Estimate the seconds of the solves in ``own_influence``, besides those that a ``StandIn`` has just made too."""
    if not isinstance(curvature, Iterative) or "leverage" not in setting.diagnostics:
        return 0.0
    return curvature.rough_seconds(setting, min(_FEWER, setting.n_train), _TOLERANCE, _ITERATIONS)


def weighted_leverage(own: Tensor, losses: Tensor, squared: bool = False) -> float:
    r"""The mean leverage of examples with these self-influences s and losses l, [example]; weighted with s.

    Leaving an example out of a fit that is linear in its weights changes its outputs by :math:`1 / (1 - h)` times the
    first-order estimate, h being its leverage. It is s / 2l for squared errors, and :math:`s / (e^l - 1)` for a
    logistic loss, which is taken for other losses too. A fit that has memorised its examples has leverages near 1:
    their gradients have vanished, and s can be a hundredth of what training without them shows.

    NaN if no example has a positive loss and self-influence.
    """
    known = own.isfinite() & losses.isfinite() & (losses > 0) & (own > 0)
    own, losses = own[known], losses[known]
    leverage = (own / (2 * losses if squared else losses.expm1())).clamp(max=1.0)
    return float((own * leverage).sum() / own.sum()) if len(own) else torch.nan


def _is_squared(setting: Setting) -> bool:
    with contextlib.suppress(ValueError):  # no linear head, or another loss
        return head_of(setting)[1].kind == "identity"
    return False


def _solved(
    curvature: Curvature, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
) -> QueryGradients:
    if not isinstance(curvature, Iterative):
        return curvature.solve(prepared, queries, setting, diagonal)
    return curvature.roughly_solved(queries, setting, diagonal, _TOLERANCE, _ITERATIONS)
