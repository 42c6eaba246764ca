"""Vectors pulled back through a graph that is kept: many at once, as far as they stay near the processor."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

# Numbers that vectors on their way through a network may hold at once: beyond the caches of a CPU, several vectors
# together take longer than one after another.
_WORKSPACE = 2**24


def at_once(parameters: int, activations: int) -> int:
    """How many vectors to pull back together.

    Args:
        parameters: numbers that a vector holds.
        activations: numbers that the examples' passage through the network makes.
    """
    return max(1, _WORKSPACE // max(1, parameters, activations))


def pull(
    sources: Sequence[Tensor], targets: Sequence[Tensor], vectors: Sequence[Tensor], together: int
) -> list[Tensor | None]:
    """Derivatives of <sources, vectors> by the targets.

    Args:
        sources: with their graph, which stays.
        targets: by which is differentiated.
        vectors: [vector, *shape of source] for each source.
        together: how many of them at once.

    Returns:
        [vector, *shape of target] for each target, None where no source depends on it.
    """
    if not sources or not targets:
        return [None] * len(targets)
    parts = [
        _together(sources, targets, [v[first : first + together] for v in vectors])
        for first in range(0, len(vectors[0]), together)
    ]
    return parts[0] if len(parts) == 1 else [_joined(of_target) for of_target in zip(*parts, strict=True)]


def _together(sources: Sequence[Tensor], targets: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor | None]:
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
    return [_joined([None if g is None else g[None] for g in of_target]) for of_target in zip(*single, strict=True)]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One behind the other; whether a target is reached does not depend on the vector."""
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])
