"""How often a DataLoader's sampler is expected to draw each example, where no batch order was captured."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.trajectory.exposure import ExpectedDraws

# Epochs to draw from a sampler whose expectation has no formula, and examples in them together.
_EPOCHS = 200
_DRAWN = 2**21
_FEWEST = 4
# Many pass a loader for scoring that does not shuffle, after a fit that did.
_NOT_SHUFFLED = (
    "`train` is a loader that does not shuffle, and its last batch is shorter or dropped: its draws are taken to be "
    "uniform. If the fit did not shuffle either, the examples of the last batch counted more, or not at all"
)


def expected_draws(loader: DataLoader[Any]) -> ExpectedDraws | None:
    """What the loader's sampler is expected to draw; None if it draws every example equally often.

    Exact for torch's own samplers, except for weights without replacement. Those and the samplers of others are
    drawn from for a number of epochs: from copies, and under a random state of their own.
    """
    batches, sampler, n = loader.batch_sampler, loader.sampler, len(loader.dataset)  # type: ignore[arg-type]
    if type(batches) is not BatchSampler:
        return _by_drawing(batches, n)
    kind = type(sampler)
    if kind is DistributedSampler:
        return None
    if kind is RandomSampler:
        drawn = _kept(len(sampler), batches)  # type: ignore[arg-type]
        return None if drawn == n else _draws(torch.ones(n, dtype=torch.float64), drawn)
    if kind is SubsetRandomSampler:
        indices = torch.as_tensor(list(sampler.indices))  # type: ignore[attr-defined]
        return _draws(torch.bincount(indices, minlength=n).double(), _kept(len(indices), batches))
    if kind is WeightedRandomSampler and sampler.replacement:  # type: ignore[attr-defined]
        weights = torch.as_tensor(sampler.weights, dtype=torch.float64).cpu()  # type: ignore[attr-defined]
        return _draws(weights, _kept(len(sampler), batches), n)  # type: ignore[arg-type]
    if kind is SequentialSampler:
        return None if n % batches.batch_size == 0 else _uniform(n, _NOT_SHUFFLED)
    if isinstance(sampler, (list, tuple, range)):
        return _of_epochs([list(batches)], n)
    return _by_drawing(batches, n)


def _uniform(n: int, note: str) -> ExpectedDraws:
    return ExpectedDraws(torch.full((n,), 1 / n, dtype=torch.float64), torch.ones(n, dtype=torch.float64), note)


def _kept(drawn: int, batches: BatchSampler) -> int:
    return drawn // batches.batch_size * batches.batch_size if batches.drop_last else drawn


def _draws(weights: Tensor, drawn: int, n: int | None = None) -> ExpectedDraws | None:
    """Independent or exchangeable draws, in proportion to the weights."""
    if n is not None:
        weights = torch.cat([weights, weights.new_zeros(max(0, n - len(weights)))])[:n]
    share = weights / weights.sum()
    return ExpectedDraws(share, share * drawn)


def _by_drawing(batches: Any, n: int) -> ExpectedDraws | None:
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    name = type(sampler).__name__
    unknown = f"`{name}` could not be drawn from: its draws are taken to be uniform, which they may not be"
    epochs: list[list[list[int]]] = []
    if getattr(sampler, "num_replicas", 1) == 1:  # of several processes, each draws a part
        with contextlib.suppress(Exception), isolated_random_state():
            torch.manual_seed(0)
            epochs = list(_epochs(batches, n))
    if not epochs or not any(epochs[0]):
        return _uniform(n, unknown)
    if all(epoch == epochs[0] for epoch in epochs):
        return _of_epochs(epochs[:1], n)
    counts = [torch.bincount(torch.tensor([i for b in epoch for i in b]), minlength=n) for epoch in epochs]
    if all(bool((count == 1).all()) for count in counts):
        return None
    found = _of_epochs(epochs, n)
    assert found is not None
    error = 1 / float(torch.stack(counts).sum(0).clamp_min(1).double().mean()) ** 0.5
    note = (
        f"How often `{name}` draws an example was estimated from {len(epochs)} of its epochs, to about {error:.1%} for "
        "an example drawn as often as most"
    )
    return ExpectedDraws(found.share, found.per_epoch, note)


def _epochs(batches: Any, n: int) -> Iterator[list[list[int]]]:
    """Batches of several epochs of a copy of the sampler."""
    own = _copied(batches)
    total = 0
    for epoch in range(_EPOCHS):
        for sampler in (own, getattr(own, "sampler", own)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        drawn, count = [], 0
        for batch in own:
            drawn.append([int(i) for i in batch])
            count += len(drawn[-1])
            if count > max(_DRAWN, 4 * n):  # a sampler without an end
                break
        yield drawn
        total += count
        if total > _DRAWN and epoch + 1 >= _FEWEST:
            return


def _copied(value: Any) -> Any:
    """A copy of a sampler that shares its data but not its state."""
    twin = copy.copy(value)
    for name, held in getattr(value, "__dict__", {}).items():
        if isinstance(held, torch.Generator):
            twin.__dict__[name] = held.clone_state()
        elif hasattr(held, "__iter__") and hasattr(held, "__dict__") and not hasattr(held, "__getitem__"):
            twin.__dict__[name] = _copied(held)  # a sampler inside
        elif isinstance(held, (list, dict, set)):
            twin.__dict__[name] = copy.copy(held)
        elif type(held).__module__ in ("random", "numpy.random._generator", "numpy.random.mtrand"):
            twin.__dict__[name] = copy.deepcopy(held)
    return twin


def _of_epochs(epochs: list[list[list[int]]], n: int) -> ExpectedDraws | None:
    """The means over some epochs of known batches."""
    share, count = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    batches = [torch.tensor(batch) for epoch in epochs for batch in epoch if batch]
    for batch in batches:
        ones = torch.ones(len(batch), dtype=torch.float64)
        count.index_add_(0, batch, ones)
        share.index_add_(0, batch, ones / len(batch))
    if bool((count == len(epochs)).all()) and len({len(batch) for batch in batches}) == 1:
        return None
    return ExpectedDraws(share / len(batches), count / len(epochs))
