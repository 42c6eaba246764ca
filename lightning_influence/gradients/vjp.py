"""Vector-Jacobian products through a graph that is kept: many vectors at once, while they fit the caches of a CPU."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_influence.devices import workspace

Source = TypeVar("Source")
Target = TypeVar("Target")


def vectors_per_pass(parameters: int, activations: int, device: torch.device) -> int:
    """How many vectors to take through a graph in one backward pass.

    Beyond the caches of a CPU, several vectors in one pass take longer than one pass per vector.

    Args:
        parameters: numbers in one vector.
        activations: numbers that the forward pass made.
        device: where the passes are computed.
    """
    return max(1, 8 * workspace(device) // max(1, parameters, activations))


def vjp(
    sources: Mapping[Source, Tensor],
    targets: Mapping[Target, Tensor],
    vectors: Mapping[Source, Tensor],
    activations: int,
) -> dict[Target, Tensor]:
    """Derivatives of <sources, vector> with respect to the targets, for every vector.

    Args:
        sources: with their graph, which is kept.
        targets: tensors in that graph.
        vectors: [vector, *shape of source]; an absent one is zero.
        activations: numbers that the forward pass made.

    Returns:
        [vector, *shape of target]; absent where no source depends on the target.
    """
    live = [key for key, source in sources.items() if source.requires_grad and key in vectors]
    if not live or not targets:
        return {}
    device = vectors[live[0]].device
    per_pass = vectors_per_pass(sum(v[0].numel() for v in vectors.values()), activations, device)
    parts = [
        _one_pass(
            [sources[key] for key in live],
            list(targets.values()),
            [vectors[key][first : first + per_pass] for key in live],
        )
        for first in range(0, len(vectors[live[0]]), per_pass)
    ]
    found = parts[0] if len(parts) == 1 else [_concatenated(of_target) for of_target in zip(*parts, strict=True)]
    return named(targets, found)


def named(names: Iterable[Target], tensors: Iterable[Tensor | None]) -> dict[Target, Tensor]:
    """The tensors by name, without those that are None."""
    return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}


def _one_pass(sources: Sequence[Tensor], targets: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    if len(vectors[0]) > 1:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*not yet implemented the batching rule.*")
                return list(
                    torch.autograd.grad(
                        sources, targets, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
                    )
                )
        except RuntimeError:  # an operation that does not run under `vmap`
            pass
    single = [
        torch.autograd.grad(sources, targets, [v[i] for v in vectors], retain_graph=True, allow_unused=True)
        for i in range(len(vectors[0]))
    ]
    return [
        _concatenated([None if g is None else g[None] for g in of_target]) for of_target in zip(*single, strict=True)
    ]


def _concatenated(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor of all vectors; whether a target is reached does not depend on the vector."""
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])
