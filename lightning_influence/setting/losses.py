"""Losses of queries under many models: forward passes only."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_influence.gradients.losses import Losses
from lightning_influence.setting.setting import Queries


def losses_under(models: Iterable[Mapping[str, Tensor]], queries: Queries) -> Tensor:
    """The loss (or measurement) of each query under each model, one model after another.

    Args:
        models: parameters and buffers by name.
        queries: some or all of them.

    Returns:
        [model, query] float64 on the CPU. The module is left at the last model.
    """
    losses_of, rows = Losses(), []
    for weights in models:
        queries.engine.task.load(weights, weights)
        blocks = queries.examples.blocks(queries.ids.start, queries.ids.stop)
        row = torch.cat([losses_of(queries.engine, block).cpu() for block in blocks])
        rows.append(row.mean(0, keepdim=True) if queries.mean else row)
    return torch.stack(rows) if rows else torch.empty(0, len(queries), dtype=torch.float64)
