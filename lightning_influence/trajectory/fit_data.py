"""What a run records about its training data: fingerprints of a few batches, and losses of a few examples."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.trajectory.fingerprints import Fingerprint, from_json, to_json, with_rows
from lightning_influence.trajectory.manifest_checks import is_fit_data

WHOLE_BATCHES = 2
"""So many batches are recorded, or made again, that do not split into examples, or whose padding follows the batch."""


@dataclass(frozen=True)
class FirstBatch:
    """A batch of the fit's first epoch.

    Args:
        ids: of its examples, in their order.
        positions: of the examples whose rows the fingerprints hold.
        loaded: as the loader delivered it; None: not seen.
        entered: as it entered ``training_step``.
    """

    ids: list[int]
    positions: list[int]
    loaded: Fingerprint | None
    entered: Fingerprint

    @property
    def some(self) -> list[int]:
        """The ids at ``positions``."""
        return [self.ids[p] for p in self.positions]

    def few(self, count: int) -> "FirstBatch":
        """The same with the rows of fewer examples."""
        which = evenly_spread(len(self.positions), count)
        loaded = None if self.loaded is None else with_rows(self.loaded, which)
        return FirstBatch(self.ids, [self.positions[k] for k in which], loaded, with_rows(self.entered, which))


@dataclass(frozen=True)
class FirstLosses:
    """The loss of ``training_step`` in eval mode for one small batch.

    Args:
        ids: of its examples.
        entered: fingerprint of that batch.
        values: step and checksum of the checkpoint, and the loss.
        dtype: of the weights.
        drew: whether the step drew random numbers, which another device does not repeat.
    """

    ids: list[int]
    entered: Fingerprint
    values: list[tuple[int, int, float]]
    dtype: str
    drew: bool


@dataclass(frozen=True)
class FitData:
    """What stood between the data and ``training_step`` in a fit.

    Args:
        dataset: the dataset's class.
        collate: name of the loader's collate function.
        datamodule: its class, or None.
        hooks: the batch-transfer hooks that somebody overrode, with the class.
        device: type of the device.
        watched: whether it is known of every batch that reading it drew no random numbers.
        confirmed: the batches are those that were made again, alike, when the fit ended: nothing random is in them.
        batches: some of the first epoch.
        losses: None where none could be computed.
    """

    dataset: str
    collate: str
    datamodule: str | None
    hooks: dict[str, str]
    device: str
    watched: bool
    confirmed: bool
    batches: tuple[FirstBatch, ...]
    losses: FirstLosses | None = None

    @property
    def certain(self) -> bool:
        """Whether other batches can only mean other data: nothing random stood between."""
        return self.confirmed or (self.watched and not self.hooks)


def encode_fit_data(data: FitData) -> str:
    """As JSON in one string: the manifest that holds it is written many times."""
    losses = data.losses
    entry = {
        **vars(data),
        "batches": [
            vars(batch) | {"loaded": to_json(batch.loaded), "entered": to_json(batch.entered)} for batch in data.batches
        ],
        "losses": None if losses is None else vars(losses) | {"entered": to_json(losses.entered)},
    }
    return json.dumps(entry)


def decode_fit_data(text: str | None) -> FitData | None:
    """From a manifest; None where it has no such entry."""
    if text is None:
        return None
    entry = json.loads(text)
    if not is_fit_data(entry):
        raise ValueError("an entry that no fit writes")
    losses = entry["losses"]
    if losses is not None:
        values = [(step, checksum, value) for step, checksum, value in losses["values"]]
        losses = FirstLosses(**losses | {"values": values, "entered": from_json(losses["entered"])})
    return FitData(**entry | {"batches": tuple(map(_batch, entry["batches"])), "losses": losses})


def _batch(entry: Mapping[str, Any]) -> FirstBatch:
    return FirstBatch(
        **dict(entry) | {"loaded": from_json(entry["loaded"]), "entered": from_json(entry["entered"]) or []}
    )


def name_of(function: Any) -> str:
    """The name of a function, of the function inside a ``partial``, or of an object's class, with its module."""
    function = getattr(function, "func", function)
    function = function if hasattr(function, "__qualname__") else type(function)
    return f"{function.__module__}.{function.__qualname__}"
