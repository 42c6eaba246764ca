"""Losses of queries under many models: forward passes only."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_influence.examples import Block
from lightning_influence.gradients.general import NotVectorisable, vectorised_losses
from lightning_influence.module import Task, seed_for
from lightning_influence.setting import Queries

# Forward passes of single examples that the vectorised ones are held against.
_CHECKED = 3


def losses(queries: Queries, models: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """[model, query] in float64: the loss (or measurement) of each query under each model, one model after another."""
    task, vectorise = queries.engine.task, True
    rows: list[Tensor] = []
    for weights in models:
        task.load(weights, weights)
        parts = []
        for block in queries.examples.blocks(queries.ids.start, queries.ids.stop):
            values, vectorise = _of_block(task, block, queries.engine.seed, vectorise, check=not rows)
            parts.append(values.double().cpu())
        row = torch.cat(parts)
        rows.append(row.mean(0, keepdim=True) if queries.mean else row)
    return torch.stack(rows) if rows else torch.empty(0, len(queries), dtype=torch.float64)


def _of_block(task: Task, block: Block, seed: int, vectorise: bool, check: bool) -> tuple[Tensor, bool]:
    """[example], and whether to go on vectorised."""
    if task.loss is not None:
        seed_for(seed, block.start)
        with torch.no_grad():
            values = task(task.to_device(block.batch))
        if values.numel() != block.size:
            raise ValueError(
                f"Expected the measurement to return {block.size} values for {block.size} examples, got "
                f"{values.numel()}."
            )
        return values, vectorise
    if vectorise:
        try:
            values = vectorised_losses(task, block)
        except NotVectorisable:
            return _one_by_one(task, block, seed, block.size), False
        if not check:
            return values, True
        alone = _one_by_one(task, block, seed, _CHECKED)
        if torch.allclose(values[: len(alone)].double(), alone.double(), rtol=1e-4, atol=1e-6, equal_nan=True):
            return values, True
    return _one_by_one(task, block, seed, block.size), False


def _one_by_one(task: Task, block: Block, seed: int, count: int) -> Tensor:
    values = []
    with torch.no_grad():
        for i in block.ids[:count]:
            batch = task.to_device(block.one(i))
            seed_for(seed, i)
            values.append(task(batch).sum())
    return torch.stack(values)
