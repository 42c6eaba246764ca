"""Examples of a stream, read again by the ids that its fit recorded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.data.reading import CannotRead
from lightning_influence.data.source import Source, source_of
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.numbering import recorded_ids, renumbered
from lightning_influence.types import MissingEvidence


class ById:
    """Examples by their ids."""

    def __init__(self, lookup: Callable[[int], Any]) -> None:
        self._lookup = lookup

    def __getitem__(self, example: int) -> Any:
        try:
            return self._lookup(int(example))
        except Exception as error:
            raise CannotRead(
                f"Expected `lookup` to return the training example of id {int(example)}, got {type(error).__name__}:"
                f" {error}. It is called with each integer that `sample_id` gave during the fit, and returns the"
                " example as the loader collates it."
            ) from error


class LookedUp(ById):
    """The examples of some ids as a dataset, by position."""

    def __init__(self, ids: Tensor, lookup: Callable[[int], Any]) -> None:
        super().__init__(lookup)
        self._ids = ids.tolist()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, position: int) -> Any:
        return super().__getitem__(self._ids[position])


@dataclass(frozen=True)
class Stream:
    """A fit on examples that are known by id only.

    Args:
        source: the examples by position.
        trajectory: of the fit, with positions in place of ids.
        ids: [example] int64, ascending, of each position.
        by_id: the examples by id.
    """

    source: Source
    trajectory: Trajectory
    ids: Tensor
    by_id: ById

    def positions(self, ids: Sequence[int]) -> list[int]:
        """Positions of ids.

        Raises:
            ValueError: one is not among those that the fit recorded.
        """
        found = {example: position for position, example in enumerate(self.ids.tolist())}
        if wrong := [i for i in ids if i not in found]:
            raise ValueError(f"Expected `ids` that the fit recorded, got {wrong[:5]!r}.")
        return [found[i] for i in ids]


def stream_of(train: Any, lookup: Callable[[int], Any], trajectory: Trajectory | None) -> Stream:
    """The examples that a fit trained on, as ``lookup`` returns them.

    Args:
        train: the training loader or dataset, whose collate function is used; None for torch's default.
        lookup: returns the example of an id.
        trajectory: of the fit.

    Raises:
        MissingEvidence: no trajectory, or one without ids.
    """
    if trajectory is None:
        raise MissingEvidence(
            "Expected the trajectory of a fit with `lookup=`, got None: the ids of the training examples are those that"
            " it recorded. Pass `trajectory=Trajectory.load(dirpath)`."
        )
    ids = recorded_ids(trajectory)
    collate, size, workers = None, None, 0
    if isinstance(train, DataLoader):
        size, workers = train.batch_size, train.num_workers
        collate = None if train.batch_size is None else train.collate_fn  # else it is given whole batches
    source = source_of(Source(LookedUp(ids, lookup), collate, workers, size, name="train"), "train")
    return Stream(source, renumbered(trajectory, ids), ids, ById(lookup))
