"""Losses of queries under many models, by forward passes."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_influence.devices import on_host
from lightning_influence.gradients.losses import Losses
from lightning_influence.setting.setting import Queries


def losses_under(models: Iterable[Mapping[str, Tensor]], queries: Queries) -> Tensor:
    """Compute the loss (or measurement) of each query under each model.

    Args:
        models: parameters and buffers by name, one dict per model.
        queries: some or all of the queries.

    Returns:
        [model, query] float64 on the CPU. The weights of the last model stay loaded.
    """
    losses_of, rows = Losses(), []
    for weights in models:
        queries.engine.task.load(weights, weights)
        blocks = queries.examples.blocks(queries.ids.start, queries.ids.stop)
        row = torch.cat([losses_of(queries.engine, block) for block in blocks])
        rows.append(row.mean(0, keepdim=True) if queries.mean else row)
    return torch.stack(on_host(rows)) if rows else torch.empty(0, len(queries), dtype=torch.float64)
