"""The gradient of one loss by parameter name, and products of its Hessian with many directions at once."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from lightning_influence.gradients.vjp import named, vjp

Key = TypeVar("Key")
NamedProduct = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""A matrix as a function of directions, [direction, *shape] by parameter name; what is absent is zero."""


def gradient_of(loss: Tensor, inputs: Mapping[Key, Tensor], create_graph: bool = False) -> dict[Key, Tensor]:
    """Derivatives of a loss with respect to its inputs; those that it does not depend on are absent.

    Args:
        loss: a scalar with its graph.
        inputs: by name.
        create_graph: whether the derivatives can be differentiated once more.
    """
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(inputs.values()), create_graph=create_graph, allow_unused=True)
    return named(inputs, found)


def hessian_of(loss: Tensor, parameters: Mapping[str, Tensor], activations: int) -> NamedProduct:
    """The Hessian of a loss with respect to its parameters, from a graph that is kept.

    Args:
        loss: a scalar with its graph.
        parameters: by name.
        activations: numbers that the forward pass made.
    """
    gradients = gradient_of(loss, parameters, create_graph=True)
    return lambda directions: vjp(gradients, parameters, directions, activations)
