"""How much of their own fit a few training examples carry: where it is much, scores understate a removal's effect."""

import contextlib

import torch
from torch import Tensor

from lightning_influence.curvature.curvature import Curvature, PreparedCurvature
from lightning_influence.curvature.iterative import Iterative
from lightning_influence.gradients.final_layer import find_head
from lightning_influence.gradients.losses import Losses
from lightning_influence.gradients.queries import EachQuery, QueryGradients
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.setting.setting import Setting

# Examples that are solved for, and with a solver that iterates.
_EXAMPLES, _FEWER = 64, 16
# A tenth is enough here, which takes a few iterations where scores take fifty.
_TOLERANCE, _ITERATIONS = 0.1, 20


def leverage_at(curvature: Curvature, prepared: PreparedCurvature, setting: Setting, diagonal: Tensor) -> float:
    r"""The leverage of a few training examples, evenly spread, each weighted with its influence on itself.

    Leaving an example out of a fit that is linear in its weights changes its outputs by :math:`1 / (1 - h)` times the
    first-order estimate, h being its leverage. With a loss l and a self-influence s it is s / 2l for squared errors,
    and for a logistic loss :math:`s / (e^l - 1)`, which is taken for other losses too. A fit that has memorised its
    examples has leverages near 1: their gradients have vanished, and s can be a hundredth of what training without
    them shows.

    NaN if no sampled example has a positive loss and self-influence.
    """
    count = min(_FEWER if isinstance(curvature, Iterative) else _EXAMPLES, setting.n_train)
    ids = evenly_spread(setting.n_train, count)
    own, losses = [], []
    losses_of, step = Losses(), max(1, min(setting.examples.block_size, curvature.at_once(setting) or count))
    for start in range(0, len(ids), step):
        chosen = ids[start : start + step]
        block = setting.examples.chosen(chosen)
        gradients = setting.engine.gradients(block)
        products = _solved(curvature, prepared, EachQuery([gradients]), setting, diagonal).diagonal(gradients)
        weights = setting.engine.weights_of(chosen)
        own.append((products if weights is None else products * weights.to(products)).cpu().double() / setting.n_train)
        losses.append(losses_of(setting.engine, block).cpu())
    return weighted_leverage(torch.cat(own), torch.cat(losses), _is_squared(setting))


def weighted_leverage(own: Tensor, losses: Tensor, squared: bool = False) -> float:
    """The mean leverage of examples with these self-influences and losses, [example]; weighted with the former."""
    known = own.isfinite() & losses.isfinite() & (losses > 0) & (own > 0)
    own, losses = own[known], losses[known]
    leverage = (own / (2 * losses if squared else losses.expm1())).clamp(max=1.0)
    return float((own * leverage).sum() / own.sum()) if len(own) else torch.nan


def _is_squared(setting: Setting) -> bool:
    engine = setting.engine
    with contextlib.suppress(ValueError):  # no linear head, or another loss
        head = find_head(engine.task, engine.reduction, setting.examples, None, engine.weights)
        return head.link(setting.examples).kind == "identity"
    return False


def _solved(
    curvature: Curvature, prepared: PreparedCurvature, queries: QueryGradients, setting: Setting, diagonal: Tensor
) -> QueryGradients:
    if not isinstance(curvature, Iterative):
        return curvature.solve(prepared, queries, setting, diagonal)
    return curvature.roughly_solved(queries, setting, diagonal, _TOLERANCE, _ITERATIONS)
