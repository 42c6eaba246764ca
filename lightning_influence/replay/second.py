"""What a step's gradients say along given directions: of each example, and of their change with the weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.gradients.general import requiring_gradients
from lightning_influence.gradients.queries import DenseQueries, QueryGradients
from lightning_influence.replay.captured import MicroBatch, Step
from lightning_influence.replay.forward import Forward

Vectors = dict[str, Tensor]
"""[k, *shape] by parameter name."""


def along(
    forward: Forward, batch: MicroBatch, step: Step, directions: Vectors, trained: Sequence[str], hessian: bool
) -> tuple[Tensor, Vectors]:
    """Products of a micro-batch's gradients, and of its Hessian, with directions.

    Args:
        forward: the module stands before the step.
        batch: one of the step's.
        step: in which it was.
        directions: [k, *shape] by name of the parameters that the step moves.
        trained: names by which the second derivative is taken.
        hessian: whether it is taken at all.

    Returns:
        [k, example], the examples' shares of the step's gradient times the directions; and the Hessian of the
        micro-batch's share of the loss times the directions, by name of ``trained``.
    """
    if not forward.joint:
        products = DenseQueries(directions, {}).dot(forward.rows(batch)) * forward.share(batch, step)
        return products, _hessian(forward, batch, step, directions, trained) if hessian else {}
    parameters = forward.task.named_parameters()
    with requiring_gradients(forward.task.module, trained):
        losses = forward.losses(batch)
        weights = torch.ones_like(losses, requires_grad=True)
        total = (losses * weights).sum() * forward.share(batch, step)
        others = list(trained) if hessian else []
        gradients = _gradients(total, parameters, list(directions))
        found = _pulled(gradients, directions, [weights, *(parameters[name] for name in others)])
    count = len(next(iter(directions.values())))
    products = losses.new_zeros(count, len(batch.ids)) if found[0] is None else found[0].detach()
    return products, {n: value.detach() for n, value in zip(others, found[1:], strict=True) if value is not None}


def scaled_products(forward: Forward, batch: MicroBatch, step: Step, queries: QueryGradients, factor: Tensor) -> Tensor:
    """[query, example]: products of queries' gradients with the examples' shares of a step's.

    Args:
        forward: the module stands before the step.
        batch: one of the step's.
        step: in which it was.
        queries: what is multiplied.
        factor: [group], what the products of each parameter group count.
    """
    if not forward.joint:
        scale = factor[:, None].expand(-1, len(batch.ids)) * forward.share(batch, step)
        return queries.dot(forward.rows(batch), scale)
    groups = forward.engine.groups
    vectors = {name: v for name, v in queries.dense().items() if name in step.moves.options}
    directions = {name: v * factor[groups.get(name, 0)].to(v) for name, v in vectors.items()}
    return along(forward, batch, step, directions, list(directions), False)[0]


def _hessian(forward: Forward, batch: MicroBatch, step: Step, directions: Vectors, trained: Sequence[str]) -> Vectors:
    parameters = forward.task.named_parameters()
    with requiring_gradients(forward.task.module, trained):
        gradients = _gradients(forward.total(batch, step), parameters, list(directions))
        found = _pulled(gradients, directions, [parameters[name] for name in trained])
    return {name: value.detach() for name, value in zip(trained, found, strict=True) if value is not None}


def _gradients(total: Tensor, parameters: Mapping[str, Tensor], names: Sequence[str]) -> Vectors:
    """That can be differentiated once more; without those that are constant."""
    if not total.requires_grad:
        return {}
    found = torch.autograd.grad(total, [parameters[name] for name in names], create_graph=True, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None and g.requires_grad}


def _pulled(gradients: Vectors, directions: Vectors, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Derivatives of <gradients, directions> by the inputs, all directions at once where torch can."""
    if not gradients:
        return [None] * len(inputs)
    outputs, seeds = list(gradients.values()), [directions[name] for name in gradients]
    try:
        return torch.autograd.grad(
            outputs, inputs, grad_outputs=seeds, is_grads_batched=True, allow_unused=True, retain_graph=True
        )
    except RuntimeError:  # an operation without a batching rule: one direction after another
        rows = [
            torch.autograd.grad(
                outputs, inputs, grad_outputs=[seed[k] for seed in seeds], allow_unused=True, retain_graph=True
            )
            for k in range(len(seeds[0]))
        ]
        return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]  # type: ignore[arg-type]
