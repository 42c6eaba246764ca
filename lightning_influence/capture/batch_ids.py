"""Which training examples are in the batches of a recorded fit, and what is said where that is not known."""

from collections.abc import Callable
from operator import index as as_index
from typing import Any

from lightning_influence.capture.identity import LoaderTap, reloaded
from lightning_influence.capture.loaders import as_indices
from lightning_influence.capture.store import RunWriter


class BatchIds:
    """The examples of each batch, as the loaders drew them or by the user's ``sample_id``.

    Args:
        trainer: of the fit.
        tap: watches its loaders.
        sample_id: a key of the batch, or a function of it, that gives unique integers; None: indices in the dataset.
        store: takes the notes.
    """

    def __init__(
        self, trainer: Any, tap: LoaderTap, sample_id: str | Callable[[Any], Any] | None, store: RunWriter
    ) -> None:
        self._trainer, self._tap, self._sample_id, self._store = trainer, tap, sample_id, store
        self._dataset: Any = None
        self.reloaded = False
        """Whether the loader was reloaded with another dataset during the fit."""

    def epoch_starts(self) -> None:
        """Note a changed dataset: ids are indices into the current one."""
        before, self._dataset = self._dataset, self._tap.dataset()
        change = reloaded(before, self._dataset)
        if change is None or self._sample_id is not None:
            return
        self.reloaded = True
        what, mixed = change
        text = f"The training loader was reloaded during the fit, with {what}: "
        if mixed:
            self._store.note(
                text + "one id means several examples, and scores mix them. Use one dataset for the whole fit."
            )
        elif not any(note.startswith(text) for note in self._store.manifest["notes"]):
            self._store.note(text + "its examples are assumed to be the same.", warn=False)

    def of(self, batch: Any) -> list[list[int] | None]:
        """The ids of the batch that is about to be trained on, for each loader; None where they are not known."""
        ids = self.skip()
        if self._sample_id is not None:
            return [self._by_key(batch)]
        if any(x is None for x in ids):
            reason = self._tap.unknown() or "it delivered a batch that its sampler did not draw"
            self._store.note(
                f"`Influence` does not know which examples are in a batch of the training loader: {reason}."
                " Pass `sample_id=`, a key of the batch or a function of it that gives unique integers. Examples are"
                " read from the loader's dataset: what its own iteration changes in them is not repeated."
            )
        elif len(ids) > 1:
            self._store.note(
                f"Each batch combines {len(ids)} loaders; `steps['loader_ids']` holds the examples of each, and"
                " `trajectory.of_loader(0)` is the fit with those of the first.",
                warn=False,
            )
        return ids

    def skip(self) -> list[list[int] | None]:
        """Pass over the next batch, for which Lightning calls no ``on_train_batch_start``."""
        return self._tap.take(self._trainer, id(self))

    def _by_key(self, batch: Any) -> list[int] | None:
        key: Any = self._sample_id
        try:
            ids = key(batch) if callable(key) else batch[key] if isinstance(batch, dict) else getattr(batch, key)
            found = as_indices(ids)
            return found if found is not None else [as_index(i.item() if hasattr(i, "item") else i) for i in ids]
        except Exception as error:
            self._store.note(
                f"Expected `sample_id={key!r}` to give one integer for each example of a batch, got"
                f" {type(error).__name__}: {error}. The examples of these batches are recorded as unknown."
            )
            return None
