"""Reads a dataset in order, in blocks; each example is read under its own seeded random state."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_influence.data.reading import collated, read_item
from lightning_influence.module.copies import Copies
from lightning_influence.module.random_state import seed_for, states_on_host
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.types import Batch, bytes_in, leaves_in, tensors_in, writable

_READ_TWICE = 4  # examples
# Blocks are kept for the next pass (the next checkpoint) up to this total size.
_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Block:
    """A batch of consecutive examples.

    Args:
        start: id of the first.
        size: how many.
        batch: the collated examples, on the CPU.
        one: returns the batch of one for an example's id.
    """

    start: int
    size: int
    batch: Batch
    one: Callable[[int], Batch]

    @property
    def ids(self) -> range:
        """Indices into the dataset."""
        return range(self.start, self.start + self.size)


@dataclass(frozen=True)
class ChosenBlock(Block):
    """A batch of any examples.

    Args:
        chosen: their ids.
    """

    chosen: Sequence[int] = ()

    @property
    def ids(self) -> Sequence[int]:  # type: ignore[override]
        """Indices into the dataset."""
        return self.chosen


class Examples:
    """Reads ``dataset`` in order, in blocks of ``block_size``.

    Args:
        dataset: map-style, with ``len`` and integer indices.
        collate: the training loader's collate function.
        block_size: examples per block.
        workers: worker processes of the loader.
        opened: whether the loader has a `worker_init_fn`, which may open what the examples are read from.
        name: of the argument that the data were passed as, for error messages.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Batch] | None,
        block_size: int,
        workers: int = 0,
        opened: bool = False,
        name: str = "data",
    ) -> None:
        self.dataset = dataset
        self.block_size = block_size
        self.share_of_copies: float | None = None
        """If set, a batch of one holds two copies of its example, and this is the ``share`` of ``Copies``."""
        self.thorough = False
        """Whether as many of them are checked before scoring as for a small model, since fewer showed too little."""
        self.looked_at: Block | None = None
        """What checks have read of them, for others."""
        self.collate = collate or default_collate
        self._reader = _Reader(dataset, self.collate, name)
        # Slicing tensors gives what torch's own collate makes of their rows, a hundred times faster.
        self._sliced = type(dataset) is TensorDataset and self.collate is default_collate
        self.workers = 0 if self._sliced else workers
        self._opened, self._name = opened, name
        self._cache: dict[range, tuple[Batch, list[int]]] = {}
        self._cache_left = _CACHE_BYTES
        self._count = len(dataset)

    def __len__(self) -> int:
        return self._count

    def first(self, count: int) -> "Examples":
        """The first examples alone."""
        some = copy.copy(self)
        some._count = min(count, len(self))
        return some

    def keeps(self, block: "Block") -> bool:
        """Whether all examples stay in memory once they were read, if they are like those of a block."""
        return keepable(block.batch) and bytes_in(block.batch) * len(self) <= _CACHE_BYTES * block.size

    @property
    def has_own_collate(self) -> bool:
        """Whether they are collated by a function of the user's."""
        return self.collate is not default_collate

    @property
    def draws(self) -> bool:
        """Whether reading an example has drawn random numbers so far."""
        return self._reader.draws

    def one(self, example: int) -> Batch:
        """The batch of one for an example; the random state is left seeded for that example."""
        seed_for(example)
        item = self._item(example)
        if self.share_of_copies is None:
            return self._collated([item], [example])
        return Copies(self._collated([item, item], [example]), self.share_of_copies)

    def _item(self, example: int) -> Any:
        return read_item(self.dataset, example, self._name, self._opened)

    def _collated(self, items: list[Any], ids: Sequence[int]) -> Batch:
        return collated(self.collate, items, ids, self.dataset, self._name)

    def some(self, ids: Sequence[int]) -> Batch:
        """A batch of the given examples."""
        if self.share_of_copies is not None and len(ids) == 1:
            return self.one(ids[0])
        if self._sliced:
            seed_for(ids[0])
            rows = torch.as_tensor(ids)
            return [tensor[rows] for tensor in self.dataset.tensors]
        return self._reader.__getitems__(list(ids))

    def chosen(self, ids: Sequence[int]) -> ChosenBlock:
        """The same as a block."""
        return ChosenBlock(ids[0], len(ids), self.some(ids), self.one, ids)

    def as_read(self, ids: Sequence[int], only: int | None = None) -> Batch:
        """The batch that a DataLoader makes of these examples under the current random state.

        Args:
            ids: which examples are read.
            only: position of the single example to return as a batch of one; all are read all the same.
        """
        before = None if self.draws else states_on_host()
        many = getattr(self.dataset, "__getitems__", None)
        items = many(list(ids)) if many else [self._item(i) for i in ids]
        self._reader.draws = before is None or before != states_on_host()
        if only is not None and self.share_of_copies is not None:
            return Copies(self._collated([items[only]] * 2, [ids[only]]), self.share_of_copies)
        return self._collated(*((items, ids) if only is None else ([items[only]], [ids[only]])))

    def check_steady(self) -> None:
        """Reads a few examples twice and compares them.

        Raises:
            ValueError: one differs under the same random state.
        """
        for i in () if self._sliced else evenly_spread(len(self), _READ_TWICE):
            if not alike(self.one(i), self.one(i)):
                raise ValueError(
                    f"Expected {type(self.dataset).__name__} to give the same example under the same random state, got "
                    f"different ones for index {i}: it draws from a generator of its own, or counts its calls. Pass "
                    "`Attributor(train=)` data without augmentation, or draw from torch's or NumPy's own generator."
                )

    def collate_draws(self, ids: Sequence[int]) -> bool:
        """Whether the collate function makes different batches of the same examples under other random states."""
        if not self.has_own_collate:
            return False
        batches = []
        for seed in (0, 1):
            items = [self._reader.seeded(i) for i in ids]
            seed_for(ids[0], seed=seed)
            batches.append(self._collated(items, ids))
        return not alike(*batches)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """The blocks from id ``start`` up to ``stop``; ``start`` is a multiple of ``block_size``."""
        stop = len(self) if stop is None else stop
        spans = [range(s, min(s + self.block_size, stop)) for s in range(start, stop, self.block_size)]
        loaded = self._load([ids for ids in spans if self._cached(ids) is None])
        for ids in spans:
            kept = self._cached(ids)
            yield Block(ids.start, len(ids), self._add_to_cache(ids, next(loaded)) if kept is None else kept, self.one)

    def _cached(self, ids: range) -> Batch | None:
        """The cached block, unless it was written to in place."""
        batch, versions = self._cache.get(ids, (None, []))
        if versions != versions_of(batch):
            del self._cache[ids]
            return None
        return batch

    def _load(self, blocks: Sequence[range]) -> Iterator[Batch]:
        ones = self.share_of_copies is not None and any(len(ids) == 1 for ids in blocks)  # workers make no copies
        if self.workers and len(blocks) > 1 and not ones:
            loader: DataLoader[Any] = DataLoader(
                self._reader,  # type: ignore[arg-type]
                batch_sampler=[list(ids) for ids in blocks],
                collate_fn=_as_it_is,
                num_workers=self.workers,
            )
            yield from loader
        else:
            for ids in blocks:
                yield self.some(ids)

    def _add_to_cache(self, ids: range, batch: Batch) -> Batch:
        size = bytes_in(batch)
        if size <= self._cache_left and keepable(batch):
            self._cache_left -= size
            self._cache[ids] = batch, versions_of(batch)
        return batch

    def close(self) -> None:
        """Empties the cache."""
        self._cache.clear()


def alike(one: Batch, other: Batch) -> bool:
    """Whether the tensors, numbers and strings of two batches agree; other objects are not compared."""
    leaves = leaves_in(one), leaves_in(other)
    if len(leaves[0]) != len(leaves[1]):
        return False
    for a, b in zip(*leaves, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            nested = a.is_nested and b.is_nested
            same = alike(a.unbind(), b.unbind()) if nested else a.shape == b.shape and _equal(a, b)
        else:
            same = a == b or a != a if isinstance(a, (int, float, str)) else True  # noqa: PLR0124
        if not same:
            return False
    return True


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.to_dense(), b.to_dense()  # what is dense stays as it is
    return bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124 - NaN


def versions_of(batch: Batch) -> list[int]:
    """The number of in-place writes to each tensor of a batch so far."""
    return [tensor._version for tensor in tensors_in(batch)]


def keepable(batch: Batch) -> bool:
    """Whether ``versions_of`` tells all that a step may have written into a batch."""
    return not any(map(writable, tree_leaves(batch)))


class _Reader:
    """Reads and collates examples. Once the dataset draws random numbers, each is seeded, otherwise only the first."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Batch], name: str) -> None:
        self.dataset, self.collate, self.name = dataset, collate, name
        self.draws = False

    def __getitems__(self, ids: list[int]) -> Batch:
        if not self.draws:
            seed_for(ids[0])
            before = states_on_host()
            items = [read_item(self.dataset, i, self.name) for i in ids]
            self.draws = before != states_on_host()
        if self.draws:
            items = [self.seeded(i) for i in ids]
        seed_for(ids[0])
        return collated(self.collate, items, ids, self.dataset, self.name)

    def seeded(self, example: int) -> Any:
        """The example under its own random state."""
        seed_for(example)
        return read_item(self.dataset, example, self.name)


def _as_it_is(batch: Batch) -> Batch:
    """The collate function of a loader whose dataset returns batches."""
    return batch
