"""The state of training between two steps: weights, buffers and the optimizer's state."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.devices import on_device, wide
from lightning_influence.module.task import Task
from lightning_influence.numerics.optimizers import OptimizerState, UpdateInput
from lightning_influence.replay.steps import Step
from lightning_influence.trajectory import SavedState
from lightning_influence.types import bytes_in


@dataclass(frozen=True)
class TrainingState:
    """Weights, buffers and optimizer state. The tensors are never written into: a step makes new ones.

    Args:
        weights: by parameter name, including frozen ones.
        buffers: by name.
        optimizer: by parameter name, without torch's counter of steps.
        counts: steps that each parameter has made, where its optimizer counts them.
    """

    weights: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizer: Mapping[str, OptimizerState] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, captured: SavedState, task: Task) -> "TrainingState":
        """A captured state on the module's device and in its precision."""
        like, buffers = task.named_parameters(), task.named_buffers()
        saved: list[tuple[dict[str, Tensor], str, Tensor]] = []
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        optimizer: dict[str, OptimizerState] = {name: {} for name in captured.optimizer if name in like}
        saved += [(found[0], name, captured.parameters[name].to(p.dtype)) for name, p in like.items()]
        saved += [(found[1], n, captured.buffers[n].to(b.dtype)) for n, b in buffers.items() if n in captured.buffers]
        saved += [
            (own, key, value.to(like[name].dtype))
            for name, own in optimizer.items()
            for key, value in captured.optimizer[name].items()
            if key != "step" and value.shape == like[name].shape
        ]
        for (own, name, _), tensor in zip(saved, on_device([t for *_, t in saved], task.device), strict=True):
            own[name] = tensor
        counts = {name: int(values["step"]) for name, values in captured.optimizer.items() if "step" in values}
        return cls(*found, optimizer, counts)

    def put_into(self, task: Task) -> None:
        """Loads the state into the module; its buffers are copies, which a forward pass may write into."""
        task.settle()
        for name, parameter in task.named_parameters().items():
            if name in self.weights:
                parameter.data = self.weights[name]
        for name, buffer in task.named_buffers().items():
            if name in self.buffers:
                buffer.data = self.buffers[name].clone()
        task.moved()
        task.weights_changed()

    def before(self, name: str, gradient: Tensor, step: Step) -> UpdateInput:
        """The input of the optimizer's rule for one parameter and its clipped gradient."""
        options = step.moves.options[name]
        return UpdateInput(
            self.weights[name], gradient, self.optimizer.get(name, {}), self.counts.get(name, 0), options
        )

    def moved(self, step: Step, gradients: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> "TrainingState":
        """The state after a step; as in torch, a parameter without a gradient does not move."""
        weights, optimizer, counts = dict(self.weights), dict(self.optimizer), dict(self.counts)
        clipped = gradients if step.clipping is None else step.clipping(gradients)
        for name, gradient in clipped.items():
            weights[name], optimizer[name] = step.moves.rule.step(self.before(name, gradient, step))
            counts[name] = counts.get(name, 0) + 1
        return TrainingState(weights, {**self.buffers, **buffers}, optimizer, counts)

    def distance(self, other: "TrainingState") -> Tensor:
        """Euclidean distance of all weights, where they are."""
        squares = [wide(self.weights[n] - other.weights[n]).square().sum() for n in self.weights]
        return torch.stack(squares or [torch.zeros(())]).sum().sqrt()

    def bytes(self) -> int:
        """Memory that one state and one gradient take."""
        return 2 * bytes_in(self.weights) + bytes_in(self.optimizer) + bytes_in(self.buffers)
