"""Which training examples stand in the batch that Lightning is about to train on."""

from typing import Any
from weakref import WeakKeyDictionary

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset

from lightning_influence.capture.loaders import Deliveries, LoaderState, track, tracker_of, untrack

_taps: "WeakKeyDictionary[Any, LoaderTap]" = WeakKeyDictionary()


class LoaderTap:
    """Watches the training loaders of one Trainer, for all callbacks that ask.

    Lightning calls `strategy.process_dataloader` after it has put in a distributed sampler and before it starts the
    iterator (fit_loop.setup_data, lightning 2.4 to 2.6); no hook of a callback lies between the two. The loader's
    indices are written down as they are drawn and never computed again from a seed.
    """

    @classmethod
    def acquire(cls, trainer: Any) -> "LoaderTap":
        """The Trainer's tap, wired on first use; every `acquire` asks for one `release`."""
        tap = _taps.get(trainer)
        if tap is None:
            tap = _taps[trainer] = cls(trainer)
        tap._users += 1
        return tap

    def __init__(self, trainer: Any) -> None:
        self._users = 0
        self._loaders: list[DataLoader] = []
        self._trackers: list[LoaderState | None] = []
        self._passes: set[tuple[int, int]] = set()  # (loader, pass) of Lightning's own iterators
        self._current: list[list[int] | None] = []
        self.read: list[dict[str, bytes] | None] = []
        """For each loader, the random generators before the batch last taken was read, of those that this drew from."""
        self._served: set[int] = set()
        self._strategy = trainer.strategy
        original = self._strategy.process_dataloader

        def process_dataloader(dataloader: Any) -> Any:
            # sanity checking and validation come through here too, and are not `training`
            if trainer.training and isinstance(dataloader, DataLoader):
                track(dataloader)
                self._loaders.append(dataloader)
            return original(dataloader)

        self._strategy.process_dataloader = process_dataloader

    def release(self, trainer: Any) -> None:
        """Undo the wiring when the last user leaves."""
        self._users -= 1
        if self._users > 0:
            return
        _taps.pop(trainer, None)
        self._strategy.__dict__.pop("process_dataloader", None)
        for loader in self._loaders:
            untrack(loader)
        self._loaders, self._trackers = [], []

    def epoch_starts(self, trainer: Any) -> None:
        """Find out which loaders this epoch draws from: they may have been reloaded."""
        leaves = tree_leaves(trainer.train_dataloader, is_leaf=lambda node: isinstance(node, DataLoader))
        self._trackers = [tracker_of(leaf) for leaf in leaves]

    def epoch_ends(self) -> None:
        """Forget batches that were delivered and not trained on."""
        for tracker in self._trackers:
            if tracker is not None:
                tracker.delivered.clear()

    def take(self, trainer: Any, user: int) -> list[list[int] | None]:
        """The indices of the next batch, one entry a loader; every user sees every batch once."""
        if user in self._served or not self._served:
            self._served.clear()
            self._current = self._next(trainer)
        self._served.add(user)
        return self._current

    def unknown(self) -> str | None:
        """Why examples cannot be told, if they cannot."""
        for tracker in self._trackers:
            if tracker is None:
                return "it is no `torch.utils.data.DataLoader`"
            if tracker.unknown is not None:
                return tracker.unknown
        return None

    def dataset(self) -> Any:
        """The one training dataset; None among several."""
        if len(self._trackers) != 1:
            return None
        loaders = (loader for loader in reversed(self._loaders) if tracker_of(loader) is self._trackers[0])
        return getattr(next(loaders, None), "dataset", None)

    def _next(self, trainer: Any) -> list[list[int] | None]:
        """Pop one delivery of each loader, past those of passes that are not Lightning's (a user's own loop)."""
        iterators = _iterators_of(trainer)
        taken: list[list[int] | None] = []
        self.read = []
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
            taken.append(_pop(tracker, alone=len(self._trackers) == 1))
        return taken


def length_of(dataset: Any) -> int | None:
    """How many examples it has, where it knows."""
    try:
        return len(dataset)
    except (TypeError, AttributeError, NotImplementedError):
        return None


def reloaded(before: Any, now: Any) -> tuple[str, bool] | None:
    """What a loader that was made again changed, and whether its ids surely stand for other examples now."""
    if before is None or now is None or before is now:
        return None
    if length_of(before) != length_of(now):
        return f"a dataset of {length_of(now)} examples in place of {length_of(before)}", True
    if isinstance(before, Subset) and isinstance(now, Subset):
        if list(before.indices) != list(now.indices):
            return "a `Subset` of other indices", True
        return reloaded(before.dataset, now.dataset)
    return f"another {type(now).__name__} of the same length", False


def _pop(tracker: LoaderState, alone: bool) -> list[int] | None:
    if tracker.delivered:
        return tracker.delivered.popleft().ids
    # among several loaders the shorter ones give nothing any more (CombinedLoader's mode "max_size")
    return [] if tracker.exhausted and tracker.unknown is None and not alone else None


def _iterators_of(trainer: Any) -> list[Any]:
    """The iterators inside Lightning's CombinedLoader, which has no public name for them."""
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    return getattr(getattr(combined, "_iterator", None), "iterators", None) or []
