"""Membership masks [subset, train] of the training sets of many models, and a few ids spread evenly."""

import torch
from torch import Tensor


def fixed_size(n_train: int, n_subsets: int, size: int, seed: int) -> Tensor:
    """Subsets of ``size`` examples each, drawn without replacement."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(n_train, generator=draw) for _ in range(n_subsets)])
    return torch.zeros(n_subsets, n_train, dtype=torch.bool).scatter_(1, order[:, :size], True)


def bernoulli(n_train: int, n_subsets: int, chance: float, seed: int) -> Tensor:
    """Subsets that hold each example independently with probability ``chance``."""
    return torch.rand(n_subsets, n_train, generator=torch.Generator().manual_seed(seed)) < chance


def without_each(n_train: int, ids: Tensor) -> Tensor:
    """For each of ``ids``, the subset of all other examples."""
    membership = torch.ones(len(ids), n_train, dtype=torch.bool)
    membership[torch.arange(len(ids)), ids] = False
    return membership


def prefixes(order: Tensor) -> Tensor:
    """The first 0, 1, ... n examples of a permutation: [n + 1, train]."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return rank[None] < torch.arange(len(order) + 1)[:, None]


def every(n_train: int) -> Tensor:
    """All 2^n subsets; bit i of the row number says whether the subset holds example i."""
    return (torch.arange(2**n_train)[:, None] >> torch.arange(n_train)).bitwise_and(1).bool()


def evenly_spread(n: int, count: int) -> list[int]:
    """At most ``count`` of the ids below ``n``, ascending, from the first to the last."""
    count = min(n, count)
    return sorted({round(i * (n - 1) / max(1, count - 1)) for i in range(count)})
