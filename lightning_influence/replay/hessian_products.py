"""What a step's gradients say along given directions: of each example, and of their change with the weights."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_influence.gradients import Gradients
from lightning_influence.gradients.general import requiring_gradients
from lightning_influence.gradients.outputs import OutputWatch
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.gradients.vjp import at_once, pull
from lightning_influence.replay.forward import Forward
from lightning_influence.replay.steps import MicroBatch, Step

Vectors = dict[str, Tensor]
"""[k, *shape] by parameter name."""

# Two ways to one product may differ by rounding: by so many units of the last place of the largest.
_ROUNDING = 1e4


class StepProducts:
    """Products of gradients, and of Hessians, of one micro-batch after another with directions.

    Args:
        forward: the module in training.
        trained: names by which second derivatives are taken; none: they are not.
    """

    def __init__(self, forward: Forward, trained: Sequence[str]) -> None:
        self.forward, self.trained = forward, list(trained)
        self._at_outputs = bool(trained) and not forward.joint
        self._compared = False

    def along(self, batch: MicroBatch, step: Step, directions: Vectors) -> tuple[Tensor, Vectors]:
        """Products of a micro-batch's share of the step's gradient, and of its Hessian, with directions.

        Args:
            batch: one of the step's, before which the module stands.
            step: in which it was.
            directions: [k, *shape] by name of the parameters that the step moves.

        Returns:
            [k, example], of each example's share of the gradient; and [k, *shape] of the Hessian, by name of
            ``trained``.
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
        """Both in one pass where the network's outputs tell its examples apart, else the Hessian alone.

        An example's product is the gradient by its outputs times their change along the direction, and that change is
        met anyway on the way back through the gradient's graph.
        """
        parameters = self.forward.task.named_parameters()
        watch = OutputWatch(parameters[name] for name in directions)
        with requiring_gradients(self.forward.task.module, self.trained):
            with watch if self._at_outputs else contextlib.nullcontext():
                total = self.forward.total(batch, step)
            outputs = [output for output in watch.outputs() if output.ndim and len(output) == len(batch.ids)]
            found = _gradients(total, [*outputs, *(parameters[name] for name in directions)])
            gradients = _by_name(directions, found[len(outputs) :])
            reached = [g for g in found[: len(outputs)] if g is not None and g.requires_grad]
            targets = [*reached, *(parameters[name] for name in self.trained)]
            pulled = _pulled(gradients, directions, targets, _together(self.forward, batch, directions))
        curved = _by_name(self.trained, pulled[len(reached) :])
        return _told_apart(reached, pulled, gradients, directions), curved


def _told_apart(
    reached: Sequence[Tensor], changes: Sequence[Tensor | None], gradients: Vectors, directions: Vectors
) -> Tensor | None:
    """[k, example]: gradients by outputs times the changes of these; None where that is not all there is."""
    products: Tensor | None = None
    for g, change in zip(reached, changes, strict=False):
        if change is not None:
            product = (change.detach() * g.detach()).reshape(len(change), len(g), -1).sum(2)
            products = product if products is None else products + product
    if products is None:
        return None
    whole = [v.reshape(len(v), -1) @ gradients[n].detach().flatten() for n, v in directions.items() if n in gradients]
    scale = products.abs().sum(1)
    return products if _close(products.sum(1), torch.stack(whole).sum(0), scale) else None


def _close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Whether the difference is rounding."""
    return bool(((found - expected).abs() <= _ROUNDING * torch.finfo(found.dtype).eps * scale).all())


def _weighted(
    forward: Forward, batch: MicroBatch, step: Step, directions: Vectors, trained: Sequence[str]
) -> tuple[Tensor, Vectors]:
    """Both, where ``loss=`` gives the losses of the examples: by the weights that they have in their sum."""
    parameters = forward.task.named_parameters()
    with requiring_gradients(forward.task.module, trained or list(directions)):
        losses = forward.losses(batch)
        weights = torch.ones_like(losses, requires_grad=True)
        total = (losses * weights).sum() * forward.share(batch, step)
        gradients = _by_name(directions, _gradients(total, [parameters[name] for name in directions]))
        targets = [weights, *(parameters[name] for name in trained)]
        pulled = _pulled(gradients, directions, targets, _together(forward, batch, directions))
    count = len(next(iter(directions.values())))
    products = losses.new_zeros(count, len(batch.ids)) if pulled[0] is None else pulled[0].detach()
    return products, _by_name(trained, pulled[1:])


def scaled_products(
    forward: Forward,
    batch: MicroBatch,
    step: Step,
    queries: QueryGradients,
    factor: Tensor,
    change: Callable[[Gradients], Gradients] | None = None,
) -> Tensor:
    """[query, example]: products of queries' gradients with the examples' shares of a step's.

    Args:
        forward: the module stands before the step.
        batch: one of the step's.
        step: in which it was.
        queries: what is multiplied.
        factor: [group], what the products of each parameter group count.
        change: what is done to the gradients of the examples before, as to those of the queries; not with ``loss=``.
    """
    if not forward.joint:
        scale = factor[:, None].expand(-1, len(batch.ids)) * forward.share(batch, step)
        rows = forward.rows(batch)
        return queries.dot(rows if change is None else change(rows), scale)
    groups = forward.engine.groups
    vectors = {name: v for name, v in queries.dense().items() if name in step.moves.options}
    directions = {name: v * factor[groups.get(name, 0)].to(v) for name, v in vectors.items()}
    return _weighted(forward, batch, step, directions, ())[0]


def _together(forward: Forward, batch: MicroBatch, directions: Vectors) -> int:
    """How many directions at once."""
    numbers = sum(rows[0].numel() for rows in directions.values())
    return at_once(numbers, len(batch.ids) * forward.engine.width())


def _by_name(names: Iterable[str], tensors: Sequence[Tensor | None]) -> Vectors:
    """Those that there are."""
    return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}


def _gradients(total: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """That can be differentiated once more."""
    if not total.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)


def _pulled(
    gradients: Vectors, directions: Vectors, inputs: Sequence[Tensor], together: int
) -> Sequence[Tensor | None]:
    """Derivatives of <gradients, directions> by the inputs."""
    curved = {name: gradient for name, gradient in gradients.items() if gradient.requires_grad}
    return pull(list(curved.values()), inputs, [directions[name] for name in curved], together)
