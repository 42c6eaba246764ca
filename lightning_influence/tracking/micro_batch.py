"""A micro-batch that a running fit is about to train on: its per-sample gradients and Hessian products."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.gradients import Engine, Gradients, Reduction
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.general import requiring_gradients
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.vjp import at_once, pull
from lightning_influence.module.task import Task, isolated_random_state
from lightning_influence.types import Batch


class PreparedTask(Task):
    """A task whose batches are already as Lightning hands them to the step."""

    @classmethod
    def of(cls, task: Task) -> "PreparedTask":
        """The same module in the same state."""
        seen = cls.__new__(cls)
        seen.__dict__.update(task.__dict__)
        return seen

    def to_device(self, batch: Batch) -> Batch:
        """The batch as it is."""
        return batch


@dataclass(frozen=True)
class TrackedMicroBatch:
    """The module in training mode, its random state that of the forward pass to come, which is not moved on.

    Args:
        engine: of a ``PreparedTask`` task.
        ids: the examples.
        data: the batch.
        share: what an example's loss is multiplied with in the step's gradient.
    """

    engine: Engine
    ids: tuple[int, ...]
    data: Batch
    share: float

    @property
    def joint(self) -> bool:
        """Whether ``loss=`` gives the losses of the joint batch."""
        return self.engine.reduction is Reduction.NONE

    def gradients(self) -> Gradients:
        """Gradients of the examples' own losses in the joint forward pass, factored where ``loss=`` is not given."""
        with isolated_random_state():
            if self.joint:
                return self._one_by_one(range(len(self.ids)))
            block = Block(0, len(self.ids), self.data, lambda i: self.data)
            return self.engine.gradients(block, as_drawn=lambda: None)

    def rows(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Those of some positions in the batch written out by name, [position, *shape]."""
        if self.joint:
            with isolated_random_state():
                return self._one_by_one(positions).dense()
        found = self.gradients() if positions else None
        parameters = self.engine.task.named_parameters()
        alone = [] if found is None else [found.slice(slice(i, i + 1)).dense() for i in positions]
        return {
            name: torch.cat([one[name] if name in one else torch.zeros_like(parameters[name])[None] for one in alone])
            if alone
            else parameters[name].new_zeros(0, *parameters[name].shape)
            for name in self.engine.plan.names
        }

    def whole(self) -> dict[str, Tensor]:
        """The micro-batch's part of the step's gradient."""
        names, parameters = list(self.engine.plan.names), self.engine.task.named_parameters()
        with isolated_random_state(), requiring_gradients(self.engine.task.module, names):
            found = torch.autograd.grad(self.total(), [parameters[name] for name in names], allow_unused=True)
        return {
            name: torch.zeros_like(parameters[name]) if gradient is None else gradient
            for name, gradient in zip(names, found, strict=True)
        }

    def curvature(self) -> "HessianProducts":
        """The Hessian of the micro-batch's part of the step's loss."""
        with isolated_random_state(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return HessianProducts.of(self)

    def total(self) -> Tensor:
        """The micro-batch's part of what the fit calls backward on."""
        loss = self.engine.task(self.data)
        return self.engine.reduction.total(loss, len(self.ids)) * self.share

    def _one_by_one(self, chosen: Sequence[int]) -> Gradients:
        """One backward pass for each example's weight: right where the forward pass mixes examples."""
        names, parameters = list(self.engine.plan.names), self.engine.task.named_parameters()
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        with requiring_gradients(self.engine.task.module, names):
            losses = self.engine.task(self.data)
            for i in chosen:
                found = torch.autograd.grad(
                    losses[i], [parameters[n] for n in names], retain_graph=True, allow_unused=True
                )
                for name, gradient in zip(names, found, strict=True):
                    rows[name].append(torch.zeros_like(parameters[name]) if gradient is None else gradient)
        groups: dict[Names, int] = {(name,): self.engine.groups.get(name, 0) for name in names}
        parts: dict[Names, Part] = {
            (name,): DenseRows((_stacked(of_name, parameters[name]),)) for name, of_name in rows.items()
        }
        return Gradients(parts, groups, len(chosen))


@dataclass(frozen=True)
class HessianProducts:
    """Products with the Hessian of one micro-batch, from a graph that is kept: many directions at once.

    Args:
        names: the parameters.
        gradients: of the micro-batch's loss, by name, with their graph; those without second derivatives are absent.
        parameters: by name.
        activations: numbers that the micro-batch's passage through the network makes.
    """

    names: Sequence[str]
    gradients: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    activations: int

    @classmethod
    def of(cls, present: TrackedMicroBatch) -> "HessianProducts":
        """Runs the forward pass and the first backward pass."""
        names, parameters = list(present.engine.plan.names), present.engine.task.named_parameters()
        with requiring_gradients(present.engine.task.module, names):
            total = present.total()
            wanted = [parameters[name] for name in names]
            found = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)
        bent = {n: g for n, g in zip(names, found, strict=True) if g is not None and g.requires_grad}
        activations = len(present.ids) * present.engine.width()
        return cls(names, bent, {name: parameters[name] for name in names}, activations)

    def times(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[direction, *shape] by name for directions of that shape."""
        width = sum(p.numel() for p in self.parameters.values())
        found = pull(
            list(self.gradients.values()),
            list(self.parameters.values()),
            [directions[name].to(gradient) for name, gradient in self.gradients.items()],
            at_once(width, self.activations),
        )
        return {
            name: torch.zeros_like(directions[name]) if product is None else product.to(directions[name])
            for name, product in zip(self.names, found, strict=True)
        }


def _stacked(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(rows)) if rows else like.new_zeros(0, *like.shape)
