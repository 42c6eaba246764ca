"""The final linear layer of a module: finding it, and reading its inputs and the gradients of its outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_influence.data.examples import Examples
from lightning_influence.devices import on_host, wide
from lightning_influence.gradients import Reduction
from lightning_influence.gradients.general import requiring_gradients
from lightning_influence.module.copies import Copies
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.task import Task
from lightning_influence.module.transforms import in_transform
from lightning_influence.numerics.heads import Link, recognise
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.types import Batch, clean

_PROBED = 32


@dataclass(frozen=True)
class HeadRows:
    """The final layer's inputs, outputs and output gradients for some examples.

    Args:
        features: the layer's inputs, [example, dim].
        outputs: its outputs (logits), [example, class].
        gradients: the gradient of each example's loss with respect to them, [example, class].
    """

    features: Tensor
    outputs: Tensor
    gradients: Tensor

    def columns(self) -> dict[str, Tensor]:
        """The tensors by name, in dtypes that Arrow can store."""
        return {name: t if t.dtype == torch.float64 else t.float() for name, t in vars(self).items()}

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum(tensor.nbytes for tensor in vars(self).values())

    def __getitem__(self, rows: slice) -> "HeadRows":
        return HeadRows(self.features[rows], self.outputs[rows], self.gradients[rows])


@dataclass(frozen=True)
class Head:
    """The final linear layer of a module; reading it takes no backward pass through the layers before it.

    Args:
        name: the layer's name in the module.
        layer: the layer.
        task: the module, silenced and in eval mode, with its loss.
        reduction: how a batch's loss relates to the losses of its examples.
        weights: [example] of the dataset, in a mean over tokens or class weights.
    """

    name: str
    layer: nn.Linear
    task: Task
    reduction: Reduction
    weights: Tensor | None = None

    def read(self, batch: Batch, size: int, weight: Tensor | None = None, noise: float = 0.0) -> HeadRows:
        """Run one batch forward and read the layer's inputs, outputs and output gradients.

        Args:
            batch: a batch of ``size`` examples.
            size: the number of examples.
            weight: replaces the layer's weight, [class, dim], with a bias as its last column; None for its own.
            noise: add normal noise of this standard deviation to the outputs.

        Raises:
            ValueError: the layer is not applied exactly once to each example, or the loss does not depend on it.
        """
        if isinstance(batch, Copies):
            return self.read(batch.batch, 2, weight, noise)[:size]
        hook = _HeadHook(self.name, size, self.layer.bias is not None, weight, noise)
        handle = self.layer.register_forward_hook(hook)
        try:
            with self.task.in_full(), requiring_gradients(self.task.module, ()):
                total = self.reduction.total(self.task(self.task.to_device(batch)), size)
        except RuntimeError as error:
            if "used in the graph" not in str(error):
                raise
            raise ValueError(
                f"Expected a loss that is a function of the outputs of the linear layer `{self.name}`, got a step that "
                "differentiates them. Name another layer by `head=`."
            ) from error
        finally:
            handle.remove()
        features, leaf = hook.one_call()
        if not total.requires_grad:
            raise ValueError(
                f"Expected a loss that depends on the linear layer `{self.name}`, got one that does not. "
                "Name the layer that produces the predictions: `head=`."
            )
        (gradient,) = torch.autograd.grad(total, leaf)
        return HeadRows(features, leaf.detach(), gradient)

    @property
    def shape(self) -> tuple[int, int]:
        """That of ``weight``."""
        return self.layer.out_features, self.layer.in_features + (self.layer.bias is not None)

    def weight(self) -> Tensor:
        """The current weight, [class, dim] float64 on the CPU, with a bias as its last column."""
        parts = [self.layer.weight] + ([] if self.layer.bias is None else [self.layer.bias[:, None]])
        return torch.cat([part.double() for part in on_host(parts)], 1)

    def augmented(self, features: Tensor) -> Tensor:
        """Features in float64 on the CPU, with a 1 appended if the layer has a bias."""
        if self.layer.bias is None:
            return features.cpu().double()
        with_one = torch.ones(len(features), features.shape[1] + 1, dtype=torch.float64)
        with_one[:, :-1] = features.cpu()
        return with_one

    def link(self, examples: Examples) -> Link:
        """Recognise the loss on the layer's outputs by how its gradient changes with them.

        Raises:
            ValueError: the loss is none of the three kinds of ``Link``, or features or gradients are not finite.
        """
        ids = evenly_spread(len(examples), _PROBED)
        probed = []
        for noise in (0.0, 1.0):
            batch = examples.some(ids)
            seed_for(ids[0])
            probed.append(self._unweighted(self.read(batch, len(ids), noise=noise), ids))
        own, moved = rows_on_host(probed)
        refuse_non_finite(own, ids)
        tolerance = 1e-6 if own.outputs.dtype == torch.float64 else 1e-2
        found = recognise(own.outputs, own.gradients, moved.outputs, moved.gradients, tolerance)
        if found is None:
            raise ValueError(
                f"Expected cross-entropy, binary cross-entropy (with logits) or a squared error on the outputs of "
                f"`{self.name}`, with the same scale for all examples, got another loss. Name another layer by "
                "`head=`, or pass `loss=`, a callable (module, batch) -> [batch] of per-sample losses of one of these "
                "kinds."
            )
        return found

    def _unweighted(self, rows: HeadRows, ids: Sequence[int]) -> HeadRows:
        """Output gradients of the examples' own losses, from those of the loss of a batch times its size."""
        if self.weights is None:
            return rows
        own = self.weights[list(ids)]
        factor = torch.where(own == 0, own, own.mean() / own).to(rows.gradients)
        return replace(rows, gradients=rows.gradients * factor[:, None])


class _HeadHook:
    """A forward hook that keeps a layer's input and makes its output a leaf of the autograd graph."""

    def __init__(self, name: str, size: int, bias: bool, weight: Tensor | None, noise: float) -> None:
        self.name, self.size, self.bias, self.weight, self.noise = name, size, bias, weight, noise
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if in_transform():
            raise ValueError(
                f"Expected the linear layer `{self.name}` to be called outside the transforms of `torch.func`, got a "
                "call within one. Name another layer by `head=`."
            )
        features = args[0].detach()
        if output.ndim != 2 or len(output) != self.size:
            raise ValueError(
                f"Expected the linear layer `{self.name}` to give [batch, class] with a batch of {self.size}, got "
                f"shape {tuple(output.shape)}. Representer points need one prediction per example; name the layer "
                "that makes it: `head=`."
            )
        leaf = output.detach()
        if self.weight is not None:
            inputs = wide(features)
            weight = self.weight.to(inputs.device)
            split = (weight[:, :-1], weight[:, -1]) if self.bias else (weight, None)
            leaf = F.linear(inputs, *split).to(output)
        if self.noise:
            draw = torch.Generator().manual_seed(0)
            leaf = leaf + self.noise * torch.randn(leaf.shape, generator=draw).to(leaf)
        leaf = leaf.requires_grad_()
        self.calls.append((features, leaf))
        return leaf.clone()  # the model may write into it

    def one_call(self) -> tuple[Tensor, Tensor]:
        """The layer's input and output.

        Raises:
            ValueError: the layer was not called exactly once.
        """
        if len(self.calls) != 1:
            raise ValueError(
                f"Expected the linear layer `{self.name}` to be called once per batch, got {len(self.calls)} calls. "
                "Name another layer by `head=`."
            )
        return self.calls[0]


def last_linear(task: Task, batch: Batch) -> str | None:
    """The name of the linear layer that is called last in the loss of a batch; None if none is called."""
    called: list[str] = []
    handles = [m.register_forward_hook(lambda *_, n=n: called.append(n)) for n, m in _linear_layers(task).items()]
    try:
        with requiring_gradients(task.module, ()):
            task(batch)
    finally:
        for handle in handles:
            handle.remove()
    return called[-1] if called else None


def _linear_layers(task: Task) -> dict[str, nn.Linear]:
    return {clean(n): m for n, m in task.module.named_modules() if isinstance(m, nn.Linear)}


def find_head(
    task: Task, reduction: Reduction, examples: Examples, name: str | None, weights: Tensor | None = None
) -> Head:
    """Find a linear layer by name, or else the linear layer that is called last.

    Raises:
        ValueError: there is none.
    """
    if reduction is Reduction.TOKENS and weights is None:
        raise ValueError(
            "Expected every example to have the same weight in the loss, got a mean over tokens or class weights, for "
            "which representer points are not known. Pass `loss=`, a callable (module, batch) -> [batch] "
            "of per-sample losses, or use `InfluenceFunction(EKFAC())`."
        )
    layers = _linear_layers(task)
    kind = type(task.module).__name__
    if name is not None:
        if name not in layers:
            known = ", ".join(f"`{n}`" for n in layers) or "none"
            raise ValueError(
                f"Expected `head` to name a linear layer of {kind}, got {name!r}. Choose one of its linear layers: "
                f"{known}."
            )
        return Head(name, layers[name], task, reduction, weights)
    last = last_linear(task, task.to_device(examples.one(0)))
    if last is None:
        raise ValueError(
            f"Expected a model that ends in a linear layer (`nn.Linear`), got {kind} without one. Representer points "
            "decompose such a layer's output; use `TracInCP()`, which needs none."
        )
    return Head(last, layers[last], task, reduction, weights)


def rows_on_host(read: Sequence[HeadRows]) -> list[HeadRows]:
    """The rows of some batches on the CPU, with a single wait for their device."""
    tensors = iter(on_host([tensor for rows in read for tensor in vars(rows).values()]))
    return [HeadRows(next(tensors), next(tensors), next(tensors)) for _ in read]


def refuse_non_finite(found: HeadRows, ids: Sequence[int]) -> None:
    """Raises ValueError that names the training examples whose features or gradients are not finite."""
    finite = found.features.isfinite().all(1) & found.gradients.isfinite().all(1)
    if not bool(finite.all()):
        rows = [ids[row] for row in (~finite).nonzero()[:, 0].tolist()]
        raise ValueError(
            f"Expected finite features and losses, got NaN or infinity for training examples {rows[:10]!r}. "
            "Repair these examples, or leave them out of the training data."
        )
