"""Fingerprints of a few batches of the first epoch, as the loader delivers them and as they enter `training_step`.

What was recorded is read again when the fit has ended (`callback.fit_data`), never during it: reading an example twice
may change a dataset that counts its calls, and a forward pass more may change what the user's module keeps elsewhere.
"""

import warnings
from typing import Any

from lightning_influence.module.data_hooks import hooks_of
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.trajectory.fingerprints import Fingerprint, fingerprint, splits
from lightning_influence.trajectory.fit_data import WHOLE_BATCHES, FirstBatch, FitData, encode_fit_data, name_of

# Of the first epoch's batches, the 1st, 2nd, 4th, 10th ... are recorded: log(n) of them, and not only its beginning.
_DUE = frozenset({0, *(3**k for k in range(7))})
_ROWS = 16  # examples of each
_LOSSES = 4


def positions_of(number: int, size: int) -> list[int] | None:
    """Positions of the examples that are summarised in the n-th batch of an epoch; None: it is not recorded."""
    if number not in _DUE or size == 0:
        return None
    return evenly_spread(size, _ROWS)


def fingerprint_or_none(batch: Any, size: int, positions: list[int]) -> Fingerprint | None:
    """The fingerprint of a batch; None for a batch that cannot be read, which must not fail the fit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fingerprint(batch, size, positions)
    except Exception:
        return None


class FirstBatches:
    """The fingerprints of one fit.

    Args:
        trainer: of the fit.
        module: the LightningModule.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self._trainer, self._module = trainer, module
        self._batches: list[FirstBatch] = []
        self._number, self._watched = 0, True
        self._epoch = trainer.current_epoch
        self.some: list[int] = []
        """Ids of a few examples of the first batch, whose loss is computed in the end."""
        self._encoded: tuple[int, str | None] = 0, None
        self.confirmed: FitData | None = None
        """What is left of the record once its batches were made again."""

    def batch_starts(
        self, ids: list[list[int] | None], batch: Any, loaded: Fingerprint | None, drew: bool | None
    ) -> None:
        """Record a batch if it is due.

        Args:
            ids: its examples, per loader.
            batch: as `training_step` will receive it.
            loaded: its fingerprint before it was transferred.
            drew: whether reading it drew random numbers; None: not known, as it was read elsewhere.
        """
        number, self._number = self._number, self._number + 1
        self._watched = self._watched and drew is not None
        if self._trainer.current_epoch != self._epoch or len(ids) != 1 or ids[0] is None:
            return
        positions = positions_of(number, len(ids[0]))
        if positions is None:
            return
        self.some = self.some or [ids[0][p] for p in evenly_spread(len(ids[0]), _LOSSES)]
        if drew:
            return
        entered = fingerprint_or_none(batch, len(ids[0]), positions)
        if entered is not None and (
            splits(entered) or sum(not splits(b.entered) for b in self._batches) < WHOLE_BATCHES
        ):
            self._batches.append(FirstBatch(list(ids[0]), positions, loaded, entered))

    def record(self, loader: Any) -> FitData | None:
        """What has been recorded so far of the training loader; None: nothing."""
        if self.confirmed is not None or not self.some:
            return self.confirmed
        datamodule = self._trainer.datamodule
        return FitData(
            dataset=type(getattr(loader, "dataset", None)).__name__,
            collate=name_of(getattr(loader, "collate_fn", None)),
            datamodule=None if datamodule is None else type(datamodule).__name__,
            hooks=hooks_of([datamodule, self._module]),
            device=self._trainer.strategy.root_device.type,
            watched=self._watched,
            confirmed=False,
            batches=tuple(self._batches),
        )

    def encoded(self, loader: Any) -> str | None:
        """The record for the manifest, which is written many times."""
        if self.confirmed is not None:
            return encode_fit_data(self.confirmed)
        if self._encoded[0] != len(self._batches) + bool(self.some):
            record = self.record(loader)
            self._encoded = len(self._batches) + bool(self.some), None if record is None else encode_fit_data(record)
        return self._encoded[1]
