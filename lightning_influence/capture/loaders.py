"""Makes a `DataLoader` report the indices of each batch it delivers, and leaves it otherwise unchanged."""

import functools
from collections import deque
from collections.abc import Iterator
from operator import index as as_index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter, _SingleProcessDataLoaderIter

from lightning_influence.capture.first_batches import fingerprint_or_none, positions_of
from lightning_influence.capture.randomness import moved_since, read_gaussians, read_generators
from lightning_influence.trajectory.fingerprints import Fingerprint

_KEY = "_influence_tracker"
_CPU = torch.device("cpu")


class Delivery(NamedTuple):
    """A batch that the loader has returned."""

    number: int  # of the iteration over the loader
    ids: list[int] | None
    read: dict[str, bytes] | None  # random states before its examples were read, of generators that reading used
    loaded: Fingerprint | None = None  # of a few batches of the first pass, before they are transferred to the device


class LoaderState:
    """Indices of one loader, from being drawn to being trained on.

    Holds no reference to an iterator: a cycle through a multiprocessing iterator would be collected inside freshly
    forked workers, where torch raises "can only test a child process".
    """

    def __init__(self, loader: DataLoader) -> None:
        self.draws: deque[Any] = deque()  # drawn by the newest iteration, not yet delivered
        self.delivered: deque[Delivery] = deque()  # not yet trained on
        self.reads_here = False  # examples are read in this process, right after their indices are drawn
        self.before: dict[str, Any] | None = None  # random states at that moment
        # normal numbers that generators cache; None: reading uses no generator that does
        self.gaussians: dict[str, bytes] | None = {}
        self.newest = 0  # number of the newest iteration
        self.exhausted = True
        self.unknown: str | None = None  # why the indices are unknown, if they are
        if isinstance(loader.dataset, IterableDataset):
            self.unknown = "its dataset is an `IterableDataset`, which has no indices"
        elif loader.num_workers > 1 and not getattr(loader, "in_order", True):
            self.unknown = "with `in_order=False`, batches arrive in another order than they are drawn"

    def failed(self, error: Exception) -> None:
        """Reading indices or random states went wrong: from here on the indices are unknown, and training goes on."""
        self.unknown = f"watching it failed with {type(error).__name__}: {error}"
        self.before = None

    def about_to_read(self) -> None:
        """Read the random states before the examples are read."""
        self.before = read_generators(_CPU)
        if self.gaussians is not None:
            self.gaussians = read_gaussians()

    def drawn_in_reading(self) -> dict[str, bytes] | None:
        """States before reading, of the generators that reading used; None if it used none, or none were read."""
        moved = None if self.before is None else moved_since(self.before, _CPU)
        self.before = None
        if moved and self.gaussians is not None:
            moved = {name: state + self.gaussians.get(name, b"") for name, state in moved.items()}
        self.gaussians = {} if moved and not moved.keys().isdisjoint({"numpy", "python"}) else None
        return moved


def track(loader: Any) -> LoaderState:
    """Start watching a loader, in place; a loader that is already watched keeps its state."""
    tracker = loader.__dict__.get(_KEY)
    if tracker is None:
        # persistent workers keep the iterator of an earlier epoch, hence one state per loader and fit
        tracker = loader.__dict__[_KEY] = LoaderState(loader)
    tracker.delivered.clear()
    if not hasattr(type(loader), "_influence_original"):
        loader.__class__ = _tracked(type(loader))  # type: ignore[arg-type]
    _rewire(loader)
    return tracker


def untrack(loader: Any) -> None:
    """Stop watching a loader and restore its class."""
    original = getattr(type(loader), "_influence_original", None)
    if original is not None:
        loader.__class__ = original
    loader.__dict__.pop(_KEY, None)
    _rewire(loader)


def tracker_of(loader: Any) -> LoaderState | None:
    """The state of a watched loader."""
    return getattr(loader, "__dict__", {}).get(_KEY)


def as_indices(drawn: Any) -> list[int] | None:
    """Convert what a sampler yielded for one batch to integers; None if it yields other keys."""
    if isinstance(drawn, Tensor) or (hasattr(drawn, "tolist") and not isinstance(drawn, (list, tuple))):
        drawn = drawn.tolist()
    if not isinstance(drawn, (list, tuple)):
        drawn = [drawn]  # with batch_size=None, samplers yield single indices
    try:
        return [as_index(i) for i in drawn]
    except TypeError:
        return None


class _Draws:
    """Iterator over a sampler that records every draw."""

    def __init__(self, iterator: Iterator, tracker: LoaderState) -> None:
        self._iterator, self._tracker, self._draws = iterator, tracker, tracker.draws

    def __iter__(self) -> "_Draws":
        return self

    def __next__(self) -> Any:
        drawn = next(self._iterator)
        self._draws.append(drawn)
        if self._tracker.reads_here:
            try:
                self._tracker.about_to_read()
            except Exception as error:
                self._tracker.failed(error)
        return drawn


class _StatefulDraws(_Draws):
    """For torchdata's `StatefulDataLoader`, which checks whether these two methods exist."""

    def state_dict(self) -> dict:
        return self._iterator.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict) -> None:
        self._iterator.load_state_dict(state)  # type: ignore[attr-defined]


class _Sampler:
    """Returned by `_index_sampler` of a watched loader; `loader.batch_sampler` itself is never replaced."""

    def __init__(self, sampler: Any, tracker: LoaderState) -> None:
        self._sampler, self._tracker = sampler, tracker

    def __iter__(self) -> Iterator:
        iterator = iter(self._sampler)
        # a new iteration, also when persistent workers are reset: indices drawn ahead but not delivered are discarded
        self._tracker.draws = deque()
        return (_StatefulDraws if _is_stateful(iterator) else _Draws)(iterator, self._tracker)

    def __len__(self) -> int:
        return len(self._sampler)


class _StatefulSampler(_Sampler):
    def state_dict(self) -> dict:
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self._sampler.load_state_dict(state)


class Deliveries:
    """The loader's iterator; each batch it returns moves one draw to `LoaderState.delivered`."""

    def __init__(self, iterator: Iterator, tracker: LoaderState) -> None:
        self._iterator, self._tracker = iterator, tracker
        self._draws, self.number = tracker.draws, tracker.newest
        self._delivered = 0
        # a generator in a subclass's `__iter__` may delay, merge or drop batches, and hides the workers
        self._foreign = not isinstance(iterator, _BaseDataLoaderIter)
        here = type(iterator) is _SingleProcessDataLoaderIter
        tracker.reads_here = here and tracker.unknown is None  # of an `IterableDataset`, no indices are drawn

    def __iter__(self) -> "Deliveries":
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "_iterator":  # not yet set while unpickling
            raise AttributeError(name)
        return getattr(self._iterator, name)

    def __next__(self) -> Any:
        tracker = self._tracker
        try:
            batch = next(self._iterator)
        except StopIteration:
            if tracker.newest == self.number:
                tracker.exhausted = True
            raise
        try:
            read = tracker.drawn_in_reading()
            ids = self._match() if tracker.unknown is None else None
            tracker.delivered.append(Delivery(self.number, ids, read, self._loaded(batch, ids)))
        except Exception as error:
            tracker.failed(error)
        return batch

    def _loaded(self, batch: Any, ids: list[int] | None) -> Fingerprint | None:
        """The fingerprint of the batch if it is one of those recorded; the first pass may be a loop of the user's."""
        number, self._delivered = self._delivered, self._delivered + 1
        if ids is None or self.number > 2 or (positions := positions_of(number, len(ids))) is None:
            return None
        return fingerprint_or_none(batch, len(ids), positions)

    def _match(self) -> list[int] | None:
        """Indices of the batch just returned: batches arrive as drawn, and the newest draws may be prefetched."""
        ahead = getattr(self._iterator, "_send_idx", 0) - getattr(self._iterator, "_rcvd_idx", 0)
        surplus = len(self._draws) - ahead - 1
        if surplus > 0 and not self._foreign and _is_fast_forwarding(self._iterator):
            for _ in range(surplus):
                self._draws.popleft()
            surplus = 0
        if surplus != 0:
            self._tracker.unknown = "its iterator does not deliver exactly one batch for each that its sampler draws"
            return None
        indices = as_indices(self._draws.popleft())
        if indices is None:
            self._tracker.unknown = "its sampler yields keys that are not integers"
        return indices


def _is_stateful(thing: Any) -> bool:
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


def _is_fast_forwarding(iterator: Any) -> bool:
    """Whether it is a stateful iterator of torchdata, which skips trained batches when it resumes."""
    return hasattr(iterator, "state_dict")


def _rewire(loader: Any) -> None:
    """Replace the sampler that persistent workers hold from an earlier iteration by the user."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and hasattr(iterator, "_index_sampler"):
        iterator._index_sampler = loader._index_sampler


def _rebuild(cls: type, state: dict) -> Any:
    loader: Any = object.__new__(cls)
    loader.__dict__.update(state)
    return loader


@functools.cache
def _tracked(cls: type) -> type:
    """Return a subclass that overrides how indices are drawn and how batches are delivered."""

    @functools.wraps(cls, updated=())
    class WatchedLoader(cls):  # type: ignore[misc, valid-type]
        _influence_original = cls

        @property
        def _index_sampler(self) -> Any:
            sampler = super()._index_sampler
            tracker = tracker_of(self)
            if tracker is None or isinstance(self.dataset, IterableDataset):
                return sampler
            return (_StatefulSampler if _is_stateful(sampler) else _Sampler)(sampler, tracker)

        def __iter__(self) -> Iterator:
            tracker = tracker_of(self)
            if tracker is None:  # Lightning creates new loaders of the same type
                return super().__iter__()
            if not tracker.exhausted:
                tracker.delivered.clear()  # the last iteration was abandoned: reload, `return -1`, limit_train_batches
            tracker.newest += 1
            tracker.exhausted, tracker.draws = False, deque()
            return Deliveries(super().__iter__(), tracker)

        def __reduce_ex__(self, protocol: Any) -> Any:
            state = {k: None if k == "_iterator" else v for k, v in self.__dict__.items() if k != _KEY}
            return _rebuild, (cls, state)

    return WatchedLoader
