"""Turns the user's Dataset or DataLoader into a dataset with a collate function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_influence.data.examples import Examples
from lightning_influence.data.expected_draws import expected_draws
from lightning_influence.data.lists import ReadRows, Rows
from lightning_influence.data.lookalikes import check_no_lookalike
from lightning_influence.trajectory.exposure import ExpectedDraws
from lightning_influence.types import Batch, base_indices, bytes_in

# Examples per block, and bytes of input per block, beyond which larger blocks are no faster.
_BLOCK = 256
_BLOCK_BYTES = 2**25


@dataclass(frozen=True)
class Source:
    """A map-style dataset and how its examples are collated into batches.

    Args:
        dataset: ``len`` and integer indices.
        collate: None for torch's default.
        workers: number of worker processes of the loader it was taken from.
        batch_size: of that loader, if it has one.
        batches: batches per epoch of that loader, if known.
        opened: whether that loader has a ``worker_init_fn``.
        loader: that loader.
        name: of the argument that the data were passed as, for error messages.
    """

    dataset: Any
    collate: Callable[[list[Any]], Batch] | None = None
    workers: int = 0
    batch_size: int | None = None
    batches: int | None = None
    opened: bool = False
    loader: DataLoader[Any] | None = None
    name: str = "data"

    def __getstate__(self) -> dict[str, Any]:
        """Without the loader: its generator cannot be sent to another process."""
        return vars(self) | {"loader": None}

    def draws(self) -> ExpectedDraws | None:
        """How often its sampler is expected to draw each example; None: equally often, or no loader is known."""
        return None if self.loader is None else expected_draws(self.loader)

    def examples(self, batch_size: int | None) -> Examples:
        """The examples in blocks of ``batch_size``; None: a size chosen from the bytes of one example."""
        return self._examples(batch_size or self._block_size())

    def _examples(self, block_size: int) -> Examples:
        return Examples(self.dataset, self.collate, block_size, self.workers, opened=self.opened, name=self.name)

    def _block_size(self) -> int:
        """At least the training batch size, which is known to fit; small examples get larger blocks."""
        one = bytes_in(self._examples(1).one(0))
        return max(self.batch_size or 1, min(_BLOCK, _BLOCK_BYTES // max(1, one)))

    def base_ids(self) -> Tensor | None:
        """[example]: indices into the dataset underneath nested ``Subset``s; None if it is no ``Subset``."""
        return base_indices(self.dataset.dataset if isinstance(self.dataset, Rows) else self.dataset)


def source_of(data: Any, name: str, like: Source | None = None) -> Source:
    """The source of a Dataset or DataLoader.

    Args:
        data: what the user passed.
        name: the argument's name, for error messages.
        like: the training source, whose collate function and workers are used for a Dataset.

    Raises:
        TypeError: it has no length and integer indices, or is a single example, a table or ids.
        ValueError: it is empty.
    """
    if data is None or isinstance(data, (type, str, bytes)):
        got = f"the class `{data.__name__}`" if isinstance(data, type) else repr(data)
        raise TypeError(f"Expected `{name}` to be a Dataset or a DataLoader, got {got}. Pass an object with examples.")
    if not _holds_loaders(data):
        check_no_lookalike(data, name)
    if isinstance(data, Source):
        source = data
    elif isinstance(data, DataLoader):
        source = _from_loader(data, name)
    elif (
        isinstance(data, IterableDataset)
        or not (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
        or _holds_loaders(data)
    ):
        raise TypeError(
            f"Expected `{name}` to be a map-style Dataset or a DataLoader of one, got {type(data).__name__}, which has "
            "no examples by index. Pass a Dataset with `__len__` and `__getitem__`; for a stream whose fit had "
            "`Influence(sample_id=)`, `lookup=`, which returns the example of an id; for several loaders at once, the "
            "one whose examples are meant, with `loss=` and `trajectory.of_loader(0)`."
        )
    elif like is not None and isinstance(like.collate, ReadRows):
        source = _like_rows(data, like.collate, like.workers)
    else:
        source = Source(data, like.collate if like else None, like.workers if like else 0)
    if len(source.dataset) == 0:
        raise ValueError(
            f"Expected `{name}` to hold at least one example, got an empty {type(source.dataset).__name__}."
        )
    return source if isinstance(data, Source) else replace(source, name=name)


def _like_rows(data: Any, read: ReadRows, workers: int) -> Source:
    """A Dataset beside training data that are read by lists of indices; of their class, it is read likewise."""
    if type(data) is type(read.dataset):
        return Source(Rows(data), ReadRows(data, read.convert), workers)
    return Source(data, None, workers)


def _holds_loaders(data: Any) -> bool:
    """Whether this is a list or dict of loaders, as a Trainer accepts, rather than of examples."""
    values = data.values() if isinstance(data, Mapping) else data if isinstance(data, (list, tuple)) else ()
    return any(isinstance(value, DataLoader) for value in islice(values, 8))


def _from_loader(loader: DataLoader[Any], name: str) -> Source:
    if isinstance(loader.dataset, IterableDataset):
        return source_of(loader.dataset, name)
    sampler, opened = loader.sampler, loader.worker_init_fn is not None
    if loader.batch_sampler is None and isinstance(sampler, BatchSampler):  # the dataset is given lists of indices
        rows, read = Rows(loader.dataset), ReadRows(loader.dataset, loader.collate_fn)
        size = getattr(sampler, "batch_size", None)
        return Source(rows, read, loader.num_workers, size, _length(sampler), opened)
    if loader.batch_sampler is None:  # `batch_size=None`: the items of the dataset are the batches
        raise TypeError(
            f"Expected `{name}` to be a loader that collates examples into batches, got `batch_size=None`. Pass the "
            "Dataset of single examples, with a loader or trajectory whose ids are theirs."
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return Source(loader.dataset, loader.collate_fn, loader.num_workers, size, _length(loader), opened, loader)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
