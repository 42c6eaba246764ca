"""A micro-batch that the fit is about to train on: its per-sample gradients and Hessian-vector products."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.data.examples import ChosenBlock
from lightning_influence.gradients import Engine, Gradients, Reduction
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.general import math_attention, requiring_gradients
from lightning_influence.gradients.hessian import NamedProduct, gradient_of, hessian_of
from lightning_influence.gradients.part import Part
from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.module.task import Task
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
        share: factor of each example's loss, times its weight, in the loss of the step.
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
        """Per-sample gradients in one forward pass over the batch; factored unless ``loss=`` is given.

        Where a batch's loss is a mean over tokens, they are multiplied by the examples' weights.
        """
        with isolated_random_state():
            if self.joint:
                return self._one_by_one(range(len(self.ids)))
            block = ChosenBlock(self.ids[0], len(self.ids), self.data, lambda i: self.data, self.ids)
            found = self.engine.gradients(block, set_random_state=lambda: None)
            weights = self.engine.weights_of(self.ids)
            return found if weights is None else found.scaled(dict.fromkeys(found.parts, weights))

    def rows(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Per-sample gradients at some positions in the batch (at least one), by parameter name, [position, *shape]."""
        if self.joint:
            with isolated_random_state():
                return self._one_by_one(positions).dense()
        found = self.gradients()
        alone = [found.slice(slice(i, i + 1)).dense() for i in positions]
        return {
            name: torch.cat([one[name] if name in one else torch.zeros_like(p)[None] for one in alone])
            for name, p in self._parameters().items()
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
        return self.engine.reduction.total(loss, len(self.ids), self.engine.weights_of(self.ids)) * self.share

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.engine.task.named_parameters(self.engine.plan.names))

    def _one_by_one(self, chosen: Sequence[int]) -> Gradients:
        """One backward pass per example, which is also right where the forward pass mixes examples."""
        names, parameters = self.engine.plan.names, list(self._parameters().values())
        with requiring_gradients(self.engine.task.module, names):
            losses = self.engine.task(self.data)
            alone = [
                torch.autograd.grad(losses[i], parameters, retain_graph=True, materialize_grads=True) for i in chosen
            ]
        rows = dict(zip(names, zip(*alone, strict=True), strict=True))
        parts: dict[Names, Part] = {
            (name,): DenseRows((torch.stack(of_name).detach(),)) for name, of_name in rows.items()
        }
        return Gradients(parts, {(name,): self.engine.groups.get(name, 0) for name in names}, len(chosen))
