"""The loss of every example of a block, each as a batch of one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.data.examples import Block, Examples
from lightning_influence.devices import wide
from lightning_influence.gradients.engine import Engine
from lightning_influence.gradients.general import NotVectorisable, vectorised_losses
from lightning_influence.gradients.unlike_rows import UnlikeRows
from lightning_influence.module.random_state import seed_for

# Examples of the first block whose vectorised losses are checked by forward passes of their own.
_COMPARED = 3


class Losses:
    """Computes per-sample losses without gradients.

    With ``loss=`` they come from one forward pass of the block. Otherwise ``torch.func.vmap`` is used if it agrees with
    forward passes of single examples on a few of the first block, else one forward pass per example.
    """

    def __init__(self) -> None:
        self._vectorised: bool | None = None

    def __call__(self, engine: Engine, block: Block) -> Tensor:
        """The losses, [example] float64, in full precision: their differences between models are what counts.

        Raises:
            ValueError: ``loss=``, or a measurement, does not return one value per example.
        """
        with engine.task.in_full():
            return self._computed(engine, block)

    def _computed(self, engine: Engine, block: Block) -> Tensor:
        if engine.task.loss is not None:
            return _jointly(engine, block)
        if self._vectorised is not False:
            try:
                seed_for(block.start)
                found = wide(vectorised_losses(engine.task, block))
                if self._vectorised is None:
                    self._vectorised = _agree(found, engine, block, block.ids[:_COMPARED])
            except NotVectorisable:
                self._vectorised = False
        return found if self._vectorised else _one_by_one(engine, block, block.ids)


def losses_alone(engine: Engine, examples: Examples, done: Callable[[int], Any] = lambda count: None) -> Tensor:
    """The losses of all examples of a dataset, [example] float64 on the CPU.

    By blocks, in which those examples are compared with passes of their own that are unlike the ones before, such as
    padded ones; where one differs, all by such passes.

    Args:
        engine: computes losses at the present weights.
        examples: the dataset.
        done: called with the number of examples after each block.
    """
    losses_of, unlike, found, counted = Losses(), UnlikeRows(), [], 0
    for block in examples.blocks():
        losses = losses_of(engine, block)
        rows = sorted({0, *(unlike.new(block) or {})})
        if not _agree(losses[rows], engine, block, [block.ids[row] for row in rows]):
            break
        found.append(losses.cpu())
        counted += block.size
        done(block.size)
    else:
        return torch.cat(found)
    found = []
    for block in examples.blocks():
        found.append(_one_by_one(engine, block, block.ids).cpu())
        done(max(0, min(block.size, block.start + block.size - counted)))
    return torch.cat(found)


def _agree(found: Tensor, engine: Engine, block: Block, ids: Sequence[int]) -> bool:
    """Whether the first losses are those of these examples of a block by passes of their own."""
    tolerance = 1e-9 if next(iter(engine.task.named_parameters().values())).dtype is torch.float64 else 1e-4
    if engine.task.tolerance is not None:
        tolerance = engine.task.tolerance[0]
    alone = _one_by_one(engine, block, ids)
    return torch.allclose(found[: len(alone)], alone, rtol=tolerance, atol=tolerance, equal_nan=True)


def _jointly(engine: Engine, block: Block) -> Tensor:
    seed_for(block.start)
    with torch.no_grad():
        values = engine.task(engine.task.to_device(block.batch))
    if values.numel() != block.size:
        raise ValueError(
            f"Expected `loss=` or the measurement to return {block.size} values for {block.size} examples, got "
            f"{values.numel()}. Do not reduce over the batch inside it."
        )
    return wide(values)


def _one_by_one(engine: Engine, block: Block, ids: Sequence[int]) -> Tensor:
    losses = []
    with torch.no_grad():
        for example in ids:
            batch = engine.task.to_device(block.one(example))
            seed_for(example)
            losses.append(engine.task(batch).sum())
    return wide(torch.stack(losses))
