"""Records one fit: writes example indices, steps and checkpoints to a run on disk."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_influence.capture.batch_ids import BatchIds
from lightning_influence.capture.deployed_weights import averaged_state, best_file
from lightning_influence.capture.first_batches import FirstBatches
from lightning_influence.capture.gradient_changes import CLIPPED_OTHERWISE, GradientChanges
from lightning_influence.capture.identity import LoaderTap, length_of
from lightning_influence.capture.in_memory import last_weights
from lightning_influence.capture.places import CannotRecord
from lightning_influence.capture.schedule import Schedule, is_ending
from lightning_influence.capture.sharded import states_of
from lightning_influence.capture.states import encode_state, has_lazy
from lightning_influence.capture.steps import StepRecorder, batch_size
from lightning_influence.capture.store import RunWriter, without_earlier_steps
from lightning_influence.capture.trainer_recorder import TrainerReads
from lightning_influence.capture.windows import RecordedBatch
from lightning_influence.compat import rank_zero_info
from lightning_influence.module.code_values import ValueRecord
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.files import BROKE_OFF
from lightning_influence.trajectory.fit_data import FitData
from lightning_influence.types import clean

_ROWS_IN_MEMORY = 1024


class Recorder:
    """Records a fit. It uses no random generator, and a failed write does not fail the fit."""

    def __init__(
        self,
        trainer: Any,
        module: Any,
        tap: LoaderTap,
        store: RunWriter,
        schedule: Schedule,
        sample_id: str | Callable[[Any], Any] | None,
        made: int,
        run_dir: Path,
    ) -> None:
        self._trainer, self._module, self._tap, self._store = trainer, module, tap, store
        self._schedule, self._ids = schedule, BatchIds(trainer, tap, sample_id, store)
        self.steps = StepRecorder(trainer, module, made)
        self.first = FirstBatches(trainer, module)
        self.failed = False
        self.broken_off: str | None = None  # why the rest of the fit is missing in the record
        self._written, self._whole = -1, True  # step of the newest checkpoint, and whether it holds the state
        self._made_at_start = made
        # step, epoch and state at the end of the last epoch: other callbacks may average the weights in `on_train_end`
        self._held: tuple[int, int, dict[str, dict]] | None = None
        self._changes = GradientChanges(trainer, module)
        self._lazy = False  # the initial checkpoint waits for the first forward pass
        self._states = states_of(trainer, module, run_dir)
        self.reads = TrainerReads(trainer, module)
        self._numbers = ValueRecord(module, store.manifest["parent"] is not None)

    @property
    def made(self) -> int:
        """Weight updates so far."""
        return self.steps.made

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the run so far."""
        return self._store.manifest

    def starts(self, verbose: bool = False) -> None:
        """Save the initial checkpoint; ``verbose``: say what those of the fit will weigh."""
        self._tap.epoch_starts(self._trainer)
        if self.steps.clips_otherwise:
            self._store.note(CLIPPED_OTHERWISE, warn=False)
        self._changes.note(self._store.manifest["notes"])
        if self.made and self._store.manifest["parent"] is None:
            self._store.note(without_earlier_steps(self.made), warn=False)
        names = {id(part): clean(name) for name, part in self._module.named_modules()}
        self._store.manifest["eval_modules"] = [names[id(m)] for m in self._module.modules() if not m.training]
        # the first forward pass gives parameters of `LazyLinear` and its like their shapes and values
        self._lazy = has_lazy(self._module)
        if not self._lazy:
            self._checkpoint("initial")
        for first in self._store.manifest["checkpoints"] if verbose else ():
            rank_zero_info(self._schedule.weight(self._trainer, first["size"]))

    def before_backward(self) -> None:
        """The batch has a loss: the Trainer is watched no longer, and lazy layers have their initial weights."""
        self.reads.unwatch()
        if self._lazy and self.made == self._made_at_start:
            self._checkpoint("initial")
        self._lazy = False
        self.steps.windows.before_backward()

    def epoch_starts(self) -> None:
        """Notice reloaded loaders and replaced optimizers."""
        self._tap.epoch_starts(self._trainer)
        self._ids.epoch_starts()
        self.reads.start()
        self.steps.windows.watch()

    def batch_starts(self, batch: Any, batch_idx: int) -> RecordedBatch:
        """Record which examples are about to be trained on, and the index of their batch."""
        ids = self._ids.of(batch)
        read = self._tap.read[0] if len(self._tap.read) == 1 else None
        self.first.batch_starts(ids, batch, self._tap.loaded, read is not None if self._tap.reads_here else None)
        self._made_at_start = self.made
        return self.steps.batch_starts(ids, batch_size(batch, ids), batch_idx, read)

    def batch_ended(self, batch: Any) -> None:
        """Complete the rows of the batch's steps; save a checkpoint if one is due."""
        self._note_reads()
        if batch is None:  # Lightning does not call `on_train_batch_start` then
            self._ids.skip()
        self.steps.batch_ended()
        every = self._schedule.every_n_train_steps
        if every and self.steps.made // every > self._made_at_start // every:
            self._checkpoint("scheduled")
        elif len(self.steps.rows) >= _ROWS_IN_MEMORY:
            self.flush()

    def epoch_ended(self) -> None:
        """Save a checkpoint if one is due; otherwise keep the weights in memory if the fit is about to end."""
        self._tap.epoch_ends()
        if self._trainer.fit_loop._skip_backward:  # StochasticWeightAveraging has loaded averaged weights
            return
        self.steps.batch_ended()
        trainer, every = self._trainer, self._schedule.every_n_epochs
        self._states.remember()
        self._numbers.note(self.made)
        if every and (trainer.current_epoch + 1) % every == 0:
            self._checkpoint("scheduled")
        if self._states.read_here and (self.failed or self._written != self.made) and is_ending(trainer):
            self._held = (self.made, trainer.current_epoch, self._states.read())

    def ended(self) -> None:
        """Save the final checkpoint: the weights after the last step, before other callbacks averaged them."""
        self.steps.batch_ended()
        self._changes.note(self._store.manifest["notes"])  # hooks that were added during the fit
        if self.failed:
            self._store.tell_broken()
            return
        if self._written != self.made and self._states.read_here:
            if self._held is not None and self._held[0] == self.made:
                self._checkpoint("final", self._held[2])
            elif self._states.changed:
                self._store.note(
                    "Another callback changed the weights in `on_train_end` before `Influence` could save them, so the"
                    " final checkpoint is missing. List `Influence` before it in `callbacks`."
                )
            else:
                self._checkpoint("final")
        elif not self._whole and self._states.read_here and not self._states.changed:
            self._written = -1  # nothing showed that it would be the last when it was written
            self._checkpoint("final")
        if self._trainer.is_global_zero:
            self._guarded(self._final_weights)
        if not self.failed:
            self._store.manifest["finished"] = True
            self.flush()

    @property
    def loader(self) -> Any:
        """The training loader; None if there are several."""
        return self._tap.loader()

    def in_memory(self) -> Trajectory:
        """The last weights of a fit whose record broke off.

        Raises:
            CannotRecord: another callback has changed them.
        """
        why, held = str(self.broken_off), self._held
        if held is None or held[0] != self.made:
            if self._states.changed:
                raise CannotRecord(f"{why} Then another callback changed the weights: the last are not known.")
            held = self.made, self._trainer.current_epoch, self._states.read()
        manifest = self._store.manifest | {"settings": self.steps.settings, "fit_seconds": self._store.seconds}
        return last_weights(*held, manifest, why)

    def confirm(self, data: FitData, differs: str | None) -> None:
        """Write what remains of the fingerprints, and what differed although nothing random went into it."""
        self.first.confirmed = data
        if differs is not None and not self._ids.reloaded:
            self._store.note(
                f"The first batches of the fit could not be made again when it had ended: {differs}. Something besides"
                " the loader and the batch-transfer hooks changed them, such as a callback or a hook in train mode, or"
                " the dataset changes with time; scores are of the batches without it."
            )
        self.flush()

    def interrupted(self) -> None:
        """Write the steps made so far, without a checkpoint: the weights may be halfway through a step."""
        self.steps.batch_ended()
        self.flush()

    def broken(self, why: str) -> None:
        """Write what was recorded before an error, and that the record ends there while the fit went on."""
        self._states.leave(why)
        manifest = self._store.manifest
        if not manifest["finished"] and (manifest["checkpoints"] or not self._trainer.is_global_zero):
            text = f"{BROKE_OFF} {self.made}, the fit went on: {why}"
            self._store.note(text, warn=False)
            manifest["broken"] = text
            self.flush()

    def flush(self) -> None:
        """Write everything recorded so far."""
        self._guarded(self._write_steps)

    def close(self) -> None:
        """Remove all hooks; harmless when repeated."""
        self.steps.windows.unwatch()
        self.reads.stop()

    def _note_reads(self) -> None:
        """The first batch has been trained on: keep what it read of the Trainer."""
        if self.reads.watching:
            self.reads.stop()
            self._store.manifest["trainer"].append([self._made_at_start, self.reads.first])

    def _checkpoint(self, kind: str, state: dict[str, dict] | None = None) -> None:
        """Write a checkpoint and the steps before it; a step has at most one checkpoint."""
        step, epoch = self.made, self._trainer.current_epoch
        if step == self._written:
            return
        whole = self._schedule.holds_state(self._trainer, kind)
        if state is None and self._states.read_here and not self.failed:
            state = self._states.read(whole)

        def write() -> None:
            if state is not None and self._trainer.is_global_zero:
                values, known = self.reads.now(), self._store.manifest["trainer"]
                if known and values != known[-1][1]:
                    known.append([step, values])
                self._store.add_checkpoint(step, epoch, kind, encode_state(state), whole)
            self._write_steps()

        self._written, self._whole = step, whole
        if kind != "initial":
            self._numbers.note(step)
        self._guarded(write)

    def _final_weights(self) -> None:
        """Write the averaged weights, if there are any, and which file is the best."""
        try:
            averaged, best = averaged_state(self._trainer, self._module), best_file(self._trainer, self.made)
        except Exception as error:
            self._store.note(f"Averaged and best weights were not recorded: {type(error).__name__}: {error}")
            return
        self._store.manifest["best"] = best
        if averaged is not None:
            self._store.add_averaged(self.made, self._trainer.current_epoch, encode_state(averaged))

    def _write_steps(self) -> None:
        manifest = self._store.manifest
        manifest["settings"] = self.steps.settings
        self._numbers.write(manifest)
        if manifest["dataset_size"] is None:
            manifest["dataset_size"] = length_of(self._tap.dataset())
        manifest["data"] = self.first.encoded(self._tap.loader())
        rows = self.steps.drain()
        if rows:
            self._store.add_steps(rows)
        self._store.write_manifest()

    def _guarded(self, write: Callable[[], None]) -> None:
        """Write; an OSError, such as a full disk, stops the recording, not the fit."""
        if self.failed:
            return
        try:
            write()
        except OSError as error:
            self.failed = True
            why = f"`Influence` could not write {error.filename or str(self._store.folder)!r}"
            why += f" ({error.strerror or error})."
            self._states.leave(why)
            if self._store.break_off(why):
                self.broken_off = why
                why += " The fit goes on without being recorded."
            if self._store.manifest["checkpoints"]:
                why += f" What was written before can be loaded from {str(self._store.folder)!r}."
            warnings.warn(why, UserWarning, stacklevel=2)
