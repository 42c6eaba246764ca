"""Per-sample gradients without a layer rule: vectorised by ``torch.func``, or one example at a time."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_influence.data.examples import Block
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.part import Part
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.replacing import replacing
from lightning_influence.module.snapshot import restoring
from lightning_influence.module.task import Task
from lightning_influence.types import clean

# The most elements of dense gradients in one vectorised call.
_VECTORISED = 2**25


class NotVectorisable(RuntimeError):
    """The module cannot run under ``torch.func.vmap``; the cause is chained."""


def vectorised_rows(task: Task, block: Block, names: Sequence[str]) -> dict[Names, Part]:
    """Dense gradients of the named parameters, by ``vmap(grad)`` over the examples of a block.

    Raises:
        NotVectorisable: the batch cannot be split along its first dimension, or the step does something that ``vmap``
            does not support (data-dependent control flow, ``.item()``).
    """
    parameters = task.named_parameters()
    wanted = {name: parameters[name].detach() for name in names}
    chunk = max(1, _VECTORISED // max(1, sum(p.numel() for p in wanted.values())))
    rows = _over_examples(task, block, wanted, torch.func.grad, chunk)
    return {(name,): DenseRows((rows[name].detach(),)) for name in names}


def vectorised_losses(task: Task, block: Block) -> Tensor:
    """[example]: the losses of a block's examples, each as a batch of one.

    Raises:
        NotVectorisable: as for ``vectorised_rows``.
    """
    with torch.no_grad():
        return _over_examples(task, block, {}, lambda loss: loss, None)


def _over_examples(
    task: Task,
    block: Block,
    values: dict[str, Tensor],
    transform: Callable[[Callable[..., Tensor]], Callable[..., Any]],
    chunk: int | None,
) -> Any:
    """Apply a transform of the loss (``torch.func.grad`` or none) to each example of a block.

    Args:
        task: the module with its loss.
        block: the examples.
        values: the parameters to differentiate by, which replace the module's own.
        transform: makes the function to vectorise from the loss, a function of ``values`` and tensors.
        chunk: the most examples per call; None for all.
    """
    batch = task.to_device(block.batch)
    leaves, spec = tree_flatten(batch)
    mapped = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == block.size for leaf in leaves]
    if not any(mapped) or any(isinstance(leaf, Tensor) and not m for leaf, m in zip(leaves, mapped, strict=True)):
        raise NotVectorisable("The batch holds tensors whose first dimension is not the example.")

    def loss(values: dict[str, Tensor], *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        one = [next(given).unsqueeze(0) if m else leaf for leaf, m in zip(leaves, mapped, strict=True)]
        with replacing(task.module, values):
            return task(tree_unflatten(one, spec)).sum()

    tensors = [leaf for leaf, m in zip(leaves, mapped, strict=True) if m]
    try:
        with without_metrics(task.module), math_attention(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not yet implemented the batching rule.*")
            return torch.func.vmap(transform(loss), (None, *[0] * len(tensors)), chunk_size=chunk)(values, *tensors)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise NotVectorisable(f"`training_step` does not run under `torch.func.vmap`: {error}") from error


def rows_one_by_one(task: Task, block: Block, names: Sequence[str]) -> tuple[dict[Names, Part], Tensor]:
    """Dense gradients by one backward pass per example: slow, and the definition of what all other paths must equal.

    Returns:
        The gradients, and the losses [example].
    """
    found = [loss_and_gradient(task, block.one(i), names, i) for i in block.ids]
    rows: dict[Names, Part] = {(n,): DenseRows((torch.stack([g[n] for _, g in found]),)) for n in names}
    return rows, torch.stack([loss for loss, _ in found])


def one_gradient(task: Task, batch: Any, names: Sequence[str], example: int) -> dict[str, Tensor]:
    """The gradient of one example's loss with respect to the named parameters, by plain autograd on a batch of one."""
    return loss_and_gradient(task, batch, names, example)[1]


def loss_and_gradient(
    task: Task,
    batch: Any,
    names: Sequence[str],
    example: int,
    watch: contextlib.AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One example's loss and its gradient, by plain autograd on a batch of one.

    Args:
        task: the module with its loss.
        batch: of one example, or of several whose summed losses are differentiated.
        names: of the parameters.
        example: its id, or that of the first.
        watch: entered around the forward pass.
    """
    parameters = task.named_parameters()
    with requiring_gradients(task.module, names):
        batch = task.to_device(batch)
        seed_for(example)
        with watch or contextlib.nullcontext():  # neither how the batch is made nor the sum below is the step's
            found = task(batch)
        loss = found.sum()
        if not loss.requires_grad:
            return loss.detach(), {name: torch.zeros_like(parameters[name]) for name in names}
        values = torch.autograd.grad(loss, [parameters[name] for name in names], materialize_grads=True)
    # tables may have sparse ones
    return loss.detach(), {name: value.to_dense() for name, value in zip(names, values, strict=True)}


@contextlib.contextmanager
def requiring_gradients(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Make only the named parameters require gradients inside."""
    wanted, parameters = set(names), dict(module.named_parameters())
    with restoring(parameters.values(), "requires_grad"):
        for name, parameter in parameters.items():
            if parameter.is_floating_point():
                parameter.requires_grad_(clean(name) in wanted)
        yield


@contextlib.contextmanager
def without_metrics(module: nn.Module) -> Iterator[None]:
    """Disable torchmetrics, whose states would keep vmap's tensors; the self-check notices a loss that needs them."""
    metrics = [m for m in module.modules() if isinstance(m, torchmetrics.Metric)]
    before = [dict(m.__dict__) for m in metrics]
    for metric in metrics:
        for name in ("forward", "update", "compute"):
            metric.__dict__[name] = _zero
    try:
        yield
    finally:
        for metric, attributes in zip(metrics, before, strict=True):
            metric.__dict__.clear()
            metric.__dict__.update(attributes)


def _zero(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(())


def math_attention() -> contextlib.AbstractContextManager[Any]:
    """Compute attention by matrix products: the fused kernels have no batching rule and no second derivative."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
