"""Products of a micro-batch's per-sample gradients, and of its Hessian, with many directions."""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.gradients import Gradients
from lightning_influence.gradients.general import requiring_gradients
from lightning_influence.gradients.hessian import gradient_of
from lightning_influence.gradients.outputs import OutputWatch
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.gradients.vjp import vjp
from lightning_influence.replay.forward import Forward
from lightning_influence.replay.steps import MicroBatch, Step

Vectors = dict[str, Tensor]
"""[direction, *shape] by parameter name."""

# Two ways to compute one product may differ by this many units in the last place of the largest term.
_ROUNDING = 1e4
# The key of the examples' weights beside the names of parameters.
_WEIGHTS = "weights of the examples' losses"


class StepProducts:
    """Products of per-sample gradients, and of the Hessian, of one micro-batch after another with directions.

    Args:
        forward: the module in training.
        trained: parameters that second derivatives are taken with respect to; empty: no second derivatives.
    """

    def __init__(self, forward: Forward, trained: Sequence[str]) -> None:
        self.forward, self.trained = forward, list(trained)
        self._at_outputs = bool(trained) and not forward.joint
        self._compared = False

    def along(self, batch: MicroBatch, step: Step, directions: Vectors) -> tuple[Tensor, Vectors]:
        """Products of directions with a micro-batch's share of the step's gradient and of its Hessian.

        Args:
            batch: one of the step's micro-batches; the module has the weights before the step.
            step: the step.
            directions: of the parameters that the step moves.

        Returns:
            [direction, example], with each example's share of the gradient; and [direction, *shape], with the Hessian,
            by name of ``trained``.
        """
        if self.forward.joint:
            return _weighted(self.forward, batch, step, directions, self.trained)
        products, curved = self._curved(batch, step, directions) if self.trained else (None, {})
        if products is None or not self._compared:
            by_rows = DenseQueries(directions, {}).dot(self.forward.rows(batch)) * self.forward.share(batch, step)
            self._at_outputs &= products is not None and _close(products, by_rows, by_rows.abs().sum(1, keepdim=True))
            self._compared, products = True, by_rows
        return products, curved

    def _curved(self, batch: MicroBatch, step: Step, directions: Vectors) -> tuple[Tensor | None, Vectors]:
        """Both from one pass where the network's outputs have a row per example, else those with the Hessian alone.

        An example's product is the derivative with respect to its outputs times the change of these outputs along the
        direction, which the backward pass through the gradient's graph computes anyway.
        """
        task = self.forward.task
        moved, trained = task.named_parameters(directions), task.named_parameters(self.trained)
        watch = OutputWatch(moved.values())
        with requiring_gradients(task.module, self.trained):
            with watch if self._at_outputs else contextlib.nullcontext():
                total = self.forward.total(batch, step)
            outputs = {i: o for i, o in enumerate(watch.outputs()) if o.ndim and len(o) == len(batch.ids)}
            found = gradient_of(total, outputs | moved, create_graph=True)
            gradients = {name: found[name] for name in directions if name in found}
            reached = {i: found[i] for i in outputs if i in found and found[i].requires_grad}
            changes = vjp(gradients, reached | trained, directions, _activations(self.forward, batch))
        products = _by_outputs(reached, changes, gradients, directions)
        return products, {name: changes[name] for name in trained if name in changes}


def _by_outputs(
    reached: Mapping[int, Tensor], changes: Mapping[int | str, Tensor], gradients: Vectors, directions: Vectors
) -> Tensor | None:
    """[direction, example]: output gradients times output changes; None where these are not the whole product."""
    products: Tensor | None = None
    for i, g in reached.items():
        if i in changes:
            product = (changes[i].detach() * g.detach()).reshape(len(changes[i]), len(g), -1).sum(2)
            products = product if products is None else products + product
    if products is None:
        return None
    whole = [v.reshape(len(v), -1) @ gradients[n].detach().flatten() for n, v in directions.items() if n in gradients]
    scale = products.abs().sum(1)
    return products if _close(products.sum(1), torch.stack(whole).sum(0), scale) else None


def _close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Whether the difference is no more than rounding."""
    return bool(((found - expected).abs() <= _ROUNDING * torch.finfo(found.dtype).eps * scale).all())


def _weighted(
    forward: Forward, batch: MicroBatch, step: Step, directions: Vectors, trained: Sequence[str]
) -> tuple[Tensor, Vectors]:
    """Both, where ``loss=`` gives the losses of the examples: derivatives with respect to their weights in the sum."""
    with requiring_gradients(forward.task.module, trained or list(directions)):
        losses = forward.losses(batch)
        weights = torch.ones_like(losses, requires_grad=True)
        total = (losses * weights).sum() * forward.share(batch, step)
        gradients = gradient_of(total, forward.task.named_parameters(directions), create_graph=True)
        targets = {_WEIGHTS: weights} | forward.task.named_parameters(trained)
        changes = vjp(gradients, targets, directions, _activations(forward, batch))
    count = len(next(iter(directions.values())))
    products = changes.pop(_WEIGHTS, losses.new_zeros(count, len(batch.ids)))
    return products.detach(), changes


def scaled_products(
    forward: Forward,
    batch: MicroBatch,
    step: Step,
    queries: QueryGradients,
    factor: Tensor,
    change: Callable[[Gradients], Gradients] | None = None,
) -> Tensor:
    """[query, example]: products of the queries' gradients with the examples' shares of a step's gradient.

    Args:
        forward: the module has the weights before the step.
        batch: one of the step's micro-batches.
        step: the step.
        queries: their gradients.
        factor: [group], multiplies the products of each parameter group.
        change: applied to the examples' gradients first, as it was to those of the queries; not with ``loss=``.
    """
    if not forward.joint:
        share = forward.share(batch, step)
        scale = factor[:, None].expand(-1, len(batch.ids)) * (share.to(factor) if isinstance(share, Tensor) else share)
        rows = forward.rows(batch)
        return queries.dot(rows if change is None else change(rows), scale)
    groups = forward.engine.groups
    vectors = queries.dense()
    moved = {name: v for name, v in vectors.items() if name in step.moves.options}
    if not moved:  # a step of an optimizer whose parameters the loss does not depend on
        return torch.zeros(len(next(iter(vectors.values()))), len(batch.ids), device=forward.task.device)
    directions = {name: v * factor[groups.get(name, 0)].to(v) for name, v in moved.items()}
    return _weighted(forward, batch, step, directions, ())[0]


def _activations(forward: Forward, batch: MicroBatch) -> int:
    return len(batch.ids) * forward.engine.width()
