"""A few batches of a fit made again, and how they differ from what entered its ``training_step``."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_influence.data.examples import Examples
from lightning_influence.data.source import Source
from lightning_influence.devices import widest
from lightning_influence.module.random_state import random_states, seed_for
from lightning_influence.module.snapshot import readings_of
from lightning_influence.module.task import Task
from lightning_influence.trajectory.fingerprints import Fingerprint, difference, fingerprint, fingerprint_later, splits
from lightning_influence.trajectory.fit_data import WHOLE_BATCHES, FirstBatch, FitData
from lightning_influence.types import Batch

# Examples of the first batch, and of each later one, that are always compared; the others while time is left.
FEW = 4, 2
# Hooks that compute on an accelerator may round as coarsely as this: TF32, autocast.
_ACCELERATED = 2e-2


@dataclass(frozen=True)
class Remade:
    """A batch of the fit made again.

    Args:
        loaded: fingerprint of what the collate function returned.
        read_entered: reads that of what enters ``training_step``, from the device.
        batch: as it enters.
        drew: whether making it drew random numbers.
    """

    loaded: Fingerprint
    read_entered: Callable[[], Fingerprint]
    batch: Batch
    drew: bool

    @cached_property
    def entered(self) -> Fingerprint:
        """The fingerprint of what enters ``training_step``."""
        return self.read_entered()


@dataclass(frozen=True)
class Mismatch:
    """A batch that is not what it was in the fit.

    Args:
        batch: the record.
        remade: None: it could not be made.
        what: differs, in words.
        whole: whether the whole batch was made again.
    """

    batch: FirstBatch
    remade: Remade | None
    what: str
    whole: bool

    @property
    def in_text(self) -> bool:
        """Whether nothing but strings differs."""
        if self.remade is None:
            return False
        return difference(self.batch.entered, self.remade.entered, rows=not self.whole, text=False) is None

    @property
    def after_loading(self) -> bool:
        """Whether the loader gives the batch of the fit, which then takes another way to ``training_step``."""
        loaded = self.batch.loaded
        if loaded is None or self.remade is None:
            return False
        return difference(loaded, self.remade.loaded, rows=not self.whole) is None


def remade(task: Task, source: Source, ids: Sequence[int], positions: Sequence[int]) -> Remade:
    """Make a batch as the fit did: dataset, collate function, and the hooks on the way to the device."""
    seed_for(ids[0])
    before = random_states()
    batch = Examples(source.dataset, source.collate, 1).as_read(ids)
    loaded = fingerprint(batch, len(ids), positions)
    # A hook may write into its batch, and a collate function may return the dataset's own tensors.
    batch = task.to_device(_copied(batch))
    entered = fingerprint_later(batch, len(ids), positions, readings_of(task.module))
    return Remade(loaded, entered, batch, before != random_states())


def mismatch(task: Task, source: Source, batch: FirstBatch, whole: bool, least: float) -> Callable[[], Mismatch | None]:
    """Make a batch of the fit; returns a function that compares it with that of the fit.

    Args:
        task: prepares the batch.
        source: the data.
        batch: the record.
        whole: make the whole batch again; otherwise one of the few examples whose rows are known.
        least: see ``difference``.
    """
    ids, positions = (batch.ids, batch.positions) if whole else (batch.some, range(len(batch.some)))
    try:
        found = remade(task, source, ids, positions)
    except Exception as error:
        failed = Mismatch(batch, None, f"{type(error).__name__}: {error}", whole)
        return lambda: failed

    def compared() -> Mismatch | None:
        what = difference(batch.entered, found.entered, rows=not whole, least=least)
        return None if what is None else Mismatch(batch, found, what, whole)

    return compared


def first_mismatch(
    task: Task, source: Source, record: FitData, seconds: float = math.inf, again: bool = False
) -> Mismatch | None:
    """The first batch of the fit that is another one now.

    Args:
        task: prepares batches.
        source: the data.
        record: of the fit.
        seconds: after this time, only a few examples of each batch are compared.
        again: compare no others, and nothing more after this time; for repetitions.
    """
    started, whole, devices = time.monotonic(), 0, {record.device, task.device.type}
    until = started + seconds if again else math.inf
    least = _ACCELERATED if record.hooks and devices != {"cpu"} else 0.0
    indices = range(len(source.dataset))  # `sample_id=` may give other numbers, which are refused where they are used
    batches = [batch for batch in record.batches if max(batch.ids) in indices and min(batch.ids) in indices]
    few = [batch.few(FEW[min(number, 1)]) for number, batch in enumerate(batches)]
    more = [b for b, known in zip(batches, few, strict=True) if b.positions != known.positions and splits(b.entered)]
    made: list[tuple[FirstBatch, Callable[[], Mismatch | None] | None]] = []
    for number, batch in enumerate([*few, *(() if again else more)]):  # all are made before the first of them is read
        if number == len(few) and not again:
            until = time.monotonic() + seconds
        if number and time.monotonic() > until:
            break
        made.append((batch, mismatch(task, source, batch, False, least) if splits(batch.entered) else None))
    for batch, compared in made:
        if compared is not None and compared() is None:
            continue  # one of a few examples is tried before the whole batch
        whole += 1
        if whole <= WHOLE_BATCHES and (found := mismatch(task, source, batch, True, least)()) is not None:
            return found
    return None


def _copied(batch: Batch) -> Batch:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)


def loss_of(task: Task, batch: Batch, ids: Sequence[int]) -> Tensor:
    """The loss of ``training_step`` on a small batch, under a random state that follows from its first example."""
    batch = _copied(batch)  # the step may write into it
    seed_for(ids[0])
    return widest(task(batch).detach()).sum()
