"""Which training examples are in the batch that Lightning is about to train on."""

import weakref
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset

from lightning_influence.capture.loaders import Deliveries, LoaderState, track, tracker_of, untrack
from lightning_influence.trajectory.fingerprints import Fingerprint

_taps: "WeakKeyDictionary[Any, LoaderTap]" = WeakKeyDictionary()


class LoaderTap:
    """Watches the training loaders of one Trainer for all callbacks that need example indices.

    Lightning calls `strategy.process_dataloader` after it has inserted a distributed sampler and before it creates the
    iterator (fit_loop.setup_data, lightning 2.4 to 2.6); no callback hook is called between the two. Indices are
    recorded as the loader draws them, never recomputed from a seed.
    """

    @classmethod
    def acquire(cls, trainer: Any) -> "LoaderTap":
        """Return the Trainer's tap, creating it on first use; each `acquire` needs one `release`."""
        tap = _taps.get(trainer)
        if tap is None:
            tap = _taps[trainer] = cls(trainer)
        tap._users += 1
        return tap

    def __init__(self, trainer: Any) -> None:
        self._users = 0
        self._trainer = weakref.ref(trainer)
        self._loaders: list[DataLoader] = []
        self._trackers: list[LoaderState | None] = []
        self._unwatched: dict[int, str] = {}  # why a loader cannot be watched, by its id
        self._leaves: list[Any] = []  # the loaders of this epoch
        self._passes: set[tuple[int, int]] = set()  # (loader, pass) of Lightning's own iterators
        self._current: list[list[int] | None] = []
        self.read: list[dict[str, bytes] | None] = []
        """Per loader: the random states before the newest batch was read, of the generators that reading it used."""
        self.loaded: Fingerprint | None = None
        """Of the newest batch as it was loaded, if it is one of those that have a fingerprint and from one loader."""
        self._served: set[int] = set()
        self._strategy = trainer.strategy
        original = self._strategy.process_dataloader

        def process_dataloader(dataloader: Any) -> Any:
            # called for sanity checking and validation too, where `training` is False
            # by a copy of the strategy too, even after `release`
            if self._users > 0 and trainer.training and isinstance(dataloader, DataLoader):
                self._watch(dataloader)
            return original(dataloader)

        self._strategy.process_dataloader = process_dataloader

    def _watch(self, loader: DataLoader) -> None:
        """Watch a loader; one that cannot be watched is used as it is, and its examples are unknown."""
        try:
            track(loader)
        except Exception as error:
            self._unwatched[id(loader)] = (
                f"a {type(loader).__name__} cannot be watched ({type(error).__name__}: {error})"
            )
        self._loaders.append(loader)

    def release(self) -> None:
        """Stop watching once every user has released the tap."""
        self._users -= 1
        if self._users > 0:
            return
        trainer = self._trainer()
        if trainer is not None and _taps.get(trainer) is self:
            del _taps[trainer]
        self._strategy.__dict__.pop("process_dataloader", None)
        for loader in self._loaders:
            untrack(loader)
        self._loaders, self._trackers, self._leaves = [], [], []

    def epoch_starts(self, trainer: Any) -> None:
        """Look up the loaders of this epoch: they may have been reloaded."""
        self._leaves = tree_leaves(trainer.train_dataloader, is_leaf=lambda node: isinstance(node, DataLoader))
        self._trackers = [tracker_of(leaf) for leaf in self._leaves]

    def epoch_ends(self) -> None:
        """Discard batches that were delivered but not trained on."""
        for tracker in self._trackers:
            if tracker is not None:
                tracker.delivered.clear()

    def take(self, trainer: Any, user: int) -> list[list[int] | None]:
        """Return the indices of the next batch, one entry per loader; each user sees each batch once."""
        if user in self._served or not self._served:
            self._served.clear()
            self._current = self._next(trainer)
        self._served.add(user)
        return self._current

    def unknown(self) -> str | None:
        """Why it is unknown which examples are in a batch; None if it is known."""
        for loader, tracker in zip(self._leaves, self._trackers, strict=True):
            if tracker is None:
                return self._unwatched.get(id(loader), "it is not a `torch.utils.data.DataLoader`")
            if tracker.unknown is not None:
                return tracker.unknown
        return None

    @property
    def reads_here(self) -> bool:
        """Whether the examples of all loaders are read in this process, where the random states can be watched."""
        return all(tracker is not None and tracker.reads_here for tracker in self._trackers)

    def loader(self) -> DataLoader | None:
        """The training loader; None if there are several."""
        if len(self._trackers) != 1:
            return None
        return next((loader for loader in reversed(self._loaders) if tracker_of(loader) is self._trackers[0]), None)

    def dataset(self) -> Any:
        """The training dataset; None if there are several."""
        return getattr(self.loader(), "dataset", None)

    def _next(self, trainer: Any) -> list[list[int] | None]:
        """Take one batch from each loader, skipping those of iterators that are not Lightning's (a user's own loop)."""
        iterators = _iterators_of(trainer)
        taken: list[list[int] | None] = []
        self.read, self.loaded = [], None
        for k, tracker in enumerate(self._trackers):
            if tracker is None:
                taken.append(None)
                self.read.append(None)
                continue
            if k < len(iterators) and isinstance(iterators[k], Deliveries):
                self._passes.add((k, iterators[k].number))
                while tracker.delivered and (k, tracker.delivered[0].number) not in self._passes:
                    tracker.delivered.popleft()
            self.read.append(tracker.delivered[0].read if tracker.delivered else None)
            self.loaded = tracker.delivered[0].loaded if tracker.delivered else None
            taken.append(_pop(tracker, alone=len(self._trackers) == 1))
        return taken


def length_of(dataset: Any) -> int | None:
    """Number of examples; None for datasets without a length."""
    try:
        return len(dataset)
    except Exception:  # it is the user's code
        return None


def reloaded(before: Any, now: Any) -> tuple[str, bool] | None:
    """What a reloaded loader changed, and whether its ids certainly belong to other examples now; None: nothing."""
    if before is None or now is None or before is now:
        return None
    if length_of(before) != length_of(now):
        return f"a dataset of {length_of(now)} examples instead of {length_of(before)}", True
    if isinstance(before, Subset) and isinstance(now, Subset):
        if list(before.indices) != list(now.indices):
            return "a `Subset` with other indices", True
        return reloaded(before.dataset, now.dataset)
    return f"another {type(now).__name__} of the same length", False


def _pop(tracker: LoaderState, alone: bool) -> list[int] | None:
    if tracker.delivered:
        return tracker.delivered.popleft().ids
    # with several loaders, the shorter ones are exhausted earlier (CombinedLoader's mode "max_size")
    return [] if tracker.exhausted and tracker.unknown is None and not alone else None


def _iterators_of(trainer: Any) -> list[Any]:
    """The iterators inside Lightning's CombinedLoader, which does not expose them."""
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    return getattr(getattr(combined, "_iterator", None), "iterators", None) or []
