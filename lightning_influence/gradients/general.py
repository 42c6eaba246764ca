"""Per-sample gradients without a factored rule: vectorised by ``torch.func``, or one example at a time."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_influence.data.examples import Block
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.module.task import Task, seed_for
from lightning_influence.types import clean

# Elements of written-out gradients that one vectorised call may hold.
_VECTORISED = 2**25


class NotVectorisable(RuntimeError):
    """The module cannot run under ``torch.func.vmap``; the cause is chained."""


def vectorised_rows(task: Task, block: Block, names: Sequence[str]) -> dict[str, DenseRows]:
    """``vmap(grad)`` over the examples of a block, by the named parameters only.

    Raises:
        NotVectorisable: the batch does not divide along its first dimension, or the step does something that ``vmap``
            refuses (data-dependent control flow, ``.item()``).
    """
    parameters = task.named_parameters()
    wanted = {name: parameters[name].detach() for name in names}
    chunk = max(1, _VECTORISED // max(1, sum(p.numel() for p in wanted.values())))
    rows = _over_examples(task, block, wanted, torch.func.grad, chunk)
    return {name: DenseRows((rows[name].detach(),)) for name in names}


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
    """What a transform of the loss gives for each example of a block, with the given values for parameters."""
    batch = task.to_device(block.batch)
    leaves, spec = tree_flatten(batch)
    mapped = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == block.size for leaf in leaves]
    if not any(mapped) or any(isinstance(leaf, Tensor) and not m for leaf, m in zip(leaves, mapped, strict=True)):
        raise NotVectorisable("The batch holds tensors whose first dimension is not the example.")

    def loss(values: dict[str, Tensor], *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        one = [next(given).unsqueeze(0) if m else leaf for leaf, m in zip(leaves, mapped, strict=True)]
        with in_place_of(task.module, values):
            return task(tree_unflatten(one, spec)).sum()

    tensors = [leaf for leaf, m in zip(leaves, mapped, strict=True) if m]
    try:
        with without_metrics(task.module), math_attention(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not yet implemented the batching rule.*")
            return torch.func.vmap(transform(loss), (None, *[0] * len(tensors)), chunk_size=chunk)(values, *tensors)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise NotVectorisable(f"`training_step` does not run under `torch.func.vmap`: {error}") from error


def rows_one_by_one(task: Task, block: Block, names: Sequence[str], seed: int) -> dict[str, DenseRows]:
    """One backward pass an example: slow, and the definition of what the other paths must equal."""
    gradients = [one_gradient(task, block.one(i), names, seed, i) for i in block.ids]
    return {name: DenseRows((torch.stack([g[name] for g in gradients]),)) for name in names}


def one_gradient(task: Task, batch: Any, names: Sequence[str], seed: int, example: int) -> dict[str, Tensor]:
    """The gradient of one example's loss by the named parameters, by plain autograd on a batch of one."""
    parameters = task.named_parameters()
    with requiring_gradients(task.module, names):
        batch = task.to_device(batch)
        seed_for(seed, example)
        loss = task(batch).sum()
        if not loss.requires_grad:
            return {name: torch.zeros_like(parameters[name]) for name in names}
        values = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    return {
        name: torch.zeros_like(parameters[name]) if value is None else value.to_dense()  # tables may have sparse ones
        for name, value in zip(names, values, strict=True)
    }


@contextlib.contextmanager
def requiring_gradients(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Only the named parameters require gradients inside."""
    wanted = set(names)
    before = [(p, p.requires_grad) for p in module.parameters()]
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(clean(name) in wanted)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextlib.contextmanager
def in_place_of(
    module: nn.Module, values: dict[str, Tensor], buffers: Mapping[str, Tensor] = MappingProxyType({})
) -> Iterator[None]:
    """Every occurrence of a named parameter or buffer stands for a given tensor inside, tied ones too."""
    standing = {id(p): values[clean(name)] for name, p in module.named_parameters() if clean(name) in values}
    standing |= {id(b): buffers[clean(name)] for name, b in module.named_buffers() if clean(name) in buffers}
    swapped = []
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for key, tensor in list(tensors.items()):
                if tensor is not None and id(tensor) in standing:
                    tensors[key] = standing[id(tensor)]  # type: ignore[assignment]
                    swapped.append((part, tensors, key, tensor))
    recurrent = {id(part): part for part, *_ in swapped}.values()
    _refresh_flat_weights(list(recurrent))
    try:
        yield
    finally:
        for _, tensors, key, tensor in swapped:
            tensors[key] = tensor  # type: ignore[assignment]
        _refresh_flat_weights(list(recurrent))


def _refresh_flat_weights(parts: Sequence[nn.Module]) -> None:
    """Recurrent modules keep a second list of their weights."""
    for part in parts:
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]


@contextlib.contextmanager
def without_metrics(module: nn.Module) -> Iterator[None]:
    """Metrics would keep vmap's tensors in their state; the self-check finds out where the loss needs them."""
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
    """Attention by plain products: the fused kernels have no batching rule and no second derivative."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
