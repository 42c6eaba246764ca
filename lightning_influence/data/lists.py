"""Datasets that read a whole batch at once, `dataset[[3, 1, 4]]`, as with `DataLoader(sampler=BatchSampler(...))`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_influence.module.random_state import states_on_host
from lightning_influence.types import Batch


@dataclass(frozen=True)
class Row:
    """Stands for one example of such a dataset until its batch is read."""

    example: int


class Rows:
    """A dataset of `Row`s, as long as the dataset that they stand for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, example: int) -> Row:
        return Row(example)


@dataclass(frozen=True)
class ReadRows:
    """Reads the batch of some rows.

    Args:
        dataset: takes a list of indices and returns their batch.
        convert: the loader's collate function, which is given that batch.
    """

    dataset: Any
    convert: Callable[[Any], Batch]

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch.

        Raises:
            ValueError: reading several examples draws random numbers.
        """
        before = states_on_host() if len(rows) > 1 else None
        batch = self.convert(self.dataset[[row.example for row in rows]])
        if before is not None and before != states_on_host():
            raise ValueError(
                f"Expected {type(self.dataset).__name__} to read a list of examples without random numbers, got a"
                " random one: an example would depend on its neighbours. Pass `Attributor(train=)` a loader of the"
                " same data without augmentation."
            )
        return batch
