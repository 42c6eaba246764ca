"""A micro-batch that the fit is about to train on: its per-sample gradients and Hessian-vector products."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.gradients import Engine, Gradients, Reduction
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.general import math_attention, requiring_gradients
from lightning_influence.gradients.hessian import NamedProduct, gradient_of, hessian_of
from lightning_influence.gradients.part import Part
from lightning_influence.module.task import Task, isolated_random_state
from lightning_influence.types import Batch


class PreparedTask(Task):
    """A task whose batches are already on the device, as `training_step` receives them."""

    @classmethod
    def of(cls, task: Task) -> "PreparedTask":
        """The same task for such batches."""
        prepared = cls.__new__(cls)
        prepared.__dict__.update(task.__dict__)
        return prepared

    def to_device(self, batch: Batch) -> Batch:
        """Return the batch unchanged."""
        return batch


@dataclass(frozen=True)
class TrackedMicroBatch:
    """The module is in training mode, with the random state of the coming forward pass, which is left as it is.

    Args:
        engine: with a ``PreparedTask``.
        ids: of the examples.
        data: the batch.
        share: factor of each example's loss in the loss of the step.
    """

    engine: Engine
    ids: tuple[int, ...]
    data: Batch
    share: float

    @property
    def joint(self) -> bool:
        """Whether losses come from ``loss=`` for the whole batch, in which examples may affect one another."""
        return self.engine.reduction is Reduction.NONE

    def gradients(self) -> Gradients:
        """Per-sample gradients in one forward pass over the batch; factored unless ``loss=`` is given."""
        with isolated_random_state():
            if self.joint:
                return self._one_by_one(range(len(self.ids)))
            block = Block(0, len(self.ids), self.data, lambda i: self.data)
            return self.engine.gradients(block, set_random_state=lambda: None)

    def rows(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Per-sample gradients at some positions in the batch, by parameter name, [position, *shape]."""
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
        """The gradient of the micro-batch's part of the step's loss."""
        parameters = self._parameters()
        with isolated_random_state(), requiring_gradients(self.engine.task.module, list(parameters)):
            found = gradient_of(self.total(), parameters)
        return {name: found[name] if name in found else torch.zeros_like(p) for name, p in parameters.items()}

    def hessian(self) -> NamedProduct:
        """The Hessian of the micro-batch's part of the step's loss."""
        parameters = self._parameters()
        with isolated_random_state(), math_attention(), requiring_gradients(self.engine.task.module, list(parameters)):
            return hessian_of(self.total(), parameters, len(self.ids) * self.engine.width())

    def total(self) -> Tensor:
        """The micro-batch's part of the step's loss."""
        loss = self.engine.task(self.data)
        return self.engine.reduction.total(loss, len(self.ids)) * self.share

    def _parameters(self) -> dict[str, Tensor]:
        parameters = self.engine.task.named_parameters()
        return {name: parameters[name] for name in self.engine.plan.names}

    def _one_by_one(self, chosen: Sequence[int]) -> Gradients:
        """One backward pass per example, which is also right where the forward pass mixes examples."""
        parameters = self._parameters()
        rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
        with requiring_gradients(self.engine.task.module, list(parameters)):
            losses = self.engine.task(self.data)
            for i in chosen:
                found = torch.autograd.grad(losses[i], list(parameters.values()), retain_graph=True, allow_unused=True)
                for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
                    rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
        groups: dict[Names, int] = {(name,): self.engine.groups.get(name, 0) for name in parameters}
        parts: dict[Names, Part] = {
            (name,): DenseRows((_stacked(of_name, parameters[name]),)) for name, of_name in rows.items()
        }
        return Gradients(parts, groups, len(chosen))


def _stacked(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(rows)) if rows else like.new_zeros(0, *like.shape)
