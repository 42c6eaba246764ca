"""What the user hands over as data, as a dataset of examples with the training loader's way of collating."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_influence.data.examples import Examples
from lightning_influence.types import Batch, bytes_in

# A block need not be larger than this to keep the arithmetic units busy, nor than this many bytes of input.
_BLOCK = 256
_BLOCK_BYTES = 2**25


@dataclass(frozen=True)
class Source:
    """A map-style dataset and how its examples become batches.

    Args:
        dataset: ``len`` and integer indices.
        collate: None for torch's default.
        workers: of the loader it came from.
        batch_size: of the loader it came from, where it has one.
        batches: batches per epoch of that loader, where known.
    """

    dataset: Any
    collate: Callable[[list[Any]], Batch] | None = None
    workers: int = 0
    batch_size: int | None = None
    batches: int | None = None

    def examples(self, batch_size: int | None) -> Examples:
        """Its examples in blocks of ``batch_size``, or of a size that suits them."""
        size = batch_size or self._block_size()
        return Examples(self.dataset, self.collate, size, self.workers)

    def _block_size(self) -> int:
        """The training batch size is known to fit; small examples go in larger blocks."""
        batch = Examples(self.dataset, self.collate, 1).one(0)
        one = bytes_in(batch)
        return max(self.batch_size or 1, min(_BLOCK, _BLOCK_BYTES // max(1, one)))

    def base_ids(self) -> Tensor | None:
        """Indices into the dataset under any ``Subset``; None where there is none."""
        dataset, ids = self.dataset, None
        while isinstance(dataset, Subset):
            indices = torch.as_tensor(list(dataset.indices), dtype=torch.int64)
            ids = indices if ids is None else indices[ids]
            dataset = dataset.dataset
        return ids


def source_of(data: Any, name: str, like: Source | None = None) -> Source:
    """Reads a Dataset or DataLoader.

    Args:
        data: what the user passed.
        name: the argument's name, for messages.
        like: the training source, whose collate function and workers serve for a Dataset.

    Raises:
        TypeError: something without a length and integer indices.
        ValueError: no examples in it.
    """
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
            "no examples by number. Pass a Dataset with `__len__` and `__getitem__` (for several loaders at once, the "
            "one whose examples are meant, with `loss=`)."
        )
    else:
        source = Source(data, like.collate if like else None, like.workers if like else 0)
    if len(source.dataset) == 0:
        raise ValueError(
            f"Expected `{name}` to hold at least one example, got an empty {type(source.dataset).__name__}."
        )
    return source


def _holds_loaders(data: Any) -> bool:
    """Whether these are the several loaders of a Trainer, which look like a list or dict of examples."""
    values = data.values() if isinstance(data, Mapping) else data if isinstance(data, (list, tuple)) else ()
    return any(isinstance(value, DataLoader) for value in islice(values, 8))


def _from_loader(loader: DataLoader[Any], name: str) -> Source:
    if isinstance(loader.dataset, IterableDataset):
        return source_of(loader.dataset, name)
    collate = loader.collate_fn
    if loader.batch_sampler is None:  # `batch_size=None`: the dataset's own items are the batches
        raise TypeError(
            f"Expected `{name}` to be a loader that collates examples into batches, got `batch_size=None`. Pass the "
            "Dataset of single examples, with a loader or trajectory whose ids are theirs."
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    try:
        batches = len(loader)
    except TypeError:
        batches = None
    return Source(loader.dataset, collate, loader.num_workers, size, batches)
