"""The loss of every example of a block, as a batch of one would have it."""

import warnings

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_influence.examples import Block
from lightning_influence.gradients.engine import Engine
from lightning_influence.gradients.reduction import Reduction
from lightning_influence.module import seed_for


class Losses:
    """Losses without gradients: of a joint pass where ``loss=`` gives them, by ``torch.func.vmap``, or one by one.

    Whichever is taken was right on an example of the first block.
    """

    def __init__(self) -> None:
        self._vectorised: bool | None = None

    def __call__(self, engine: Engine, block: Block) -> Tensor:
        """[example] float64."""
        with torch.no_grad():
            if engine.reduction is Reduction.NONE:
                seed_for(engine.seed, block.start)
                return engine.task(engine.task.to_device(block.batch)).double()
            if self._vectorised is None:
                self._vectorised = self._agrees(engine, block)
            return _together(engine, block) if self._vectorised else _apart(engine, block)

    def _agrees(self, engine: Engine, block: Block) -> bool:
        try:
            found = _together(engine, block)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError):
            return False
        expected = _apart(engine, block)
        tolerance = 1e-9 if next(iter(engine.task.named_parameters().values())).dtype is torch.float64 else 1e-4
        return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def _apart(engine: Engine, block: Block) -> Tensor:
    losses = []
    for example in block.ids:
        batch = engine.task.to_device(block.one(example))
        seed_for(engine.seed, example)
        losses.append(engine.task(batch).sum())
    return torch.stack(losses).double()


def _together(engine: Engine, block: Block) -> Tensor:
    leaves, spec = tree_flatten(engine.task.to_device(block.batch))
    mapped = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == block.size for leaf in leaves]
    if not any(mapped) or any(isinstance(leaf, Tensor) and not m for leaf, m in zip(leaves, mapped, strict=True)):
        raise ValueError("The batch holds tensors whose first dimension is not the example.")

    def one(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        parts = [next(given).unsqueeze(0) if m else leaf for leaf, m in zip(leaves, mapped, strict=True)]
        return engine.task(tree_unflatten(parts, spec)).sum()

    seed_for(engine.seed, block.start)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not yet implemented the batching rule.*")
        return torch.func.vmap(one)(*[x for x, m in zip(leaves, mapped, strict=True) if m]).double()
