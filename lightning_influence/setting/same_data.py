"""Whether the data of a question are those of the fit: a few of its batches are made again and compared."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Subset, default_collate

from lightning_influence.data.examples import Examples
from lightning_influence.data.source import Source
from lightning_influence.module.data_hooks import hooks_of
from lightning_influence.module.random_state import random_states, seed_for
from lightning_influence.module.task import Task
from lightning_influence.trajectory import Checkpoint, Trajectory
from lightning_influence.trajectory.fingerprints import Fingerprint, difference, fingerprint, same_rows, splits
from lightning_influence.trajectory.fit_data import FirstBatch, FitData, name_of
from lightning_influence.trajectory.numbering import combines_loaders
from lightning_influence.types import Batch

# Whole batches that are made again where a batch of a few of their examples differs: padding follows the batch.
_WHOLE = 2
# Examples of the first batch, and of each later one, that are always compared; the others while time is left.
FEW = 4, 2
_SECONDS_FOR_OTHERS = 0.02
# Hooks that compute on an accelerator may round as coarsely as this: TF32, autocast.
_ACCELERATED = 2e-2
# How long, and among how many examples, one that is not where it was is searched.
_SECONDS, _SEARCHED = 1.0, 20_000
# Checkpoints whose losses are compared, beside the last one, have at most this many bytes together.
CHECKPOINT_BYTES = 2**25
_ANYWAY = "To score these data all the same, pass `Attributor(check_data=False)`."


@dataclass(frozen=True)
class Remade:
    """A batch of the fit made again.

    Args:
        loaded: fingerprint of what the collate function returned.
        entered: of what enters ``training_step``.
        batch: as it enters.
        drew: whether making it drew random numbers.
    """

    loaded: Fingerprint
    entered: Fingerprint
    batch: Batch
    drew: bool


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
    seed_for(0, ids[0])
    before = random_states()
    batch = Examples(source.dataset, source.collate, 1).as_read(ids)
    loaded = fingerprint(batch, len(ids), positions)
    # A hook may write into its batch, and a collate function may return the dataset's own tensors.
    batch = task.to_device(_copied(batch))
    return Remade(loaded, fingerprint(batch, len(ids), positions), batch, before != random_states())


def mismatch(task: Task, source: Source, batch: FirstBatch, whole: bool, least: float) -> Mismatch | None:
    """Compare a batch of the fit with the same batch made now.

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
        return Mismatch(batch, None, f"{type(error).__name__}: {error}", whole)
    what = difference(batch.entered, found.entered, rows=not whole, least=least)
    return None if what is None else Mismatch(batch, found, what, whole)


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
    for number, batch in enumerate([*few, *(() if again else more)]):
        if number == len(few) and not again:
            until = time.monotonic() + seconds
        if number and time.monotonic() > until:
            break
        if splits(batch.entered) and mismatch(task, source, batch, False, least) is None:
            continue  # one of a few examples is tried before the whole batch
        whole += 1
        if whole <= _WHOLE and (found := mismatch(task, source, batch, True, least)) is not None:
            return found
    return None


def _copied(batch: Batch) -> Batch:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)


def loss_of(task: Task, batch: Batch, ids: Sequence[int]) -> Tensor:
    """The loss of ``training_step`` on a small batch, under a random state that follows from its first example."""
    batch = _copied(batch)  # the step may write into it
    seed_for(0, ids[0])
    return task(batch).detach().double().sum().cpu()


def check_data(task: Task, source: Source, trajectory: Trajectory, again: bool = False) -> list[str]:
    """Compare data and module with those of the fit; the last weights are loaded, and others may be afterwards.

    Args:
        task: the module.
        source: its training data, as a question reads them.
        trajectory: of the fit.
        again: compare in a few hundredths of a second, at the last weights only, what was compared before.

    Returns:
        Notes where it is uncertain whether they differ.

    Raises:
        ValueError: they are others.
    """
    if task.loss is None and combines_loaders(trajectory.steps):
        _check_step(task, source)
    record = trajectory.fit_data
    if record is None:
        return []
    found = first_mismatch(task, source, record, _SECONDS_FOR_OTHERS, again)
    losses = record.losses if task.loss is None else None
    if found is not None and not (found.in_text and losses is not None):
        cause = _cause(found, task, source, record)
        if record.certain and not found.in_text:
            raise ValueError(
                "Expected `train` to give the batches that were trained on, got others for the examples "
                f"{found.batch.some[:8]}: {found.what}. {cause} {_ANYWAY}"
            )
        doubt = "Unless that is of no account" if found.in_text else "Unless they were augmented at random"
        return [
            f"The batches that `train` gives differ from those that were trained on: {found.what}. {doubt}, which is "
            f"not known of this fit, the scores are wrong. {cause}"
        ]
    if losses is not None:  # they also tell whether strings that differ matter, which may be names of files
        what = "" if found is None else f" ({found.what})"
        _check_losses(task, source, trajectory.checkpoints[-1 if again else 0 :], record, what)
    return []


def _check_step(task: Task, source: Source) -> None:
    """Raises ValueError if ``training_step`` fails on one of the datasets whose batches the fit combined."""
    try:
        loss_of(task, remade(task, source, [0], [0]).batch, [0])
    except Exception as error:
        raise ValueError(
            "Expected `train` to give batches as in the fit, which combined those of several loaders, got those of one "
            f"dataset, on which `training_step` fails ({type(error).__name__}: {error}). Choose one of the loaders by "
            "`Attributor(trajectory=trajectory.of_loader(0))`, with its dataset as `train=`, and pass `loss=`, a "
            "callable (module, batch) -> [batch] of per-sample losses."
        ) from error


def _check_losses(task: Task, source: Source, checkpoints: Sequence[Checkpoint], record: FitData, what: str) -> None:
    """Raises ValueError if the module gives other losses than in the fit for the same batch and weights."""
    losses = record.losses
    if losses is None or max(losses.ids) >= len(source.dataset):
        return
    try:
        found = remade(task, source, losses.ids, range(len(losses.ids)))
    except Exception:
        return  # it was made with augmentation that is absent here
    if difference(losses.entered, found.entered, rows=False, text=False) is not None:
        return
    if losses.drew and record.device != task.device.type:
        return
    double = losses.dtype == "float64" and all(p.dtype is torch.float64 for p in task.named_parameters().values())
    relative = 1e-2 if record.device != task.device.type else 1e-8 if double else 1e-4
    # Of a loss that is almost 0, rounding is a larger part: a tenth of the loss before training is the measure then.
    known = [abs(value) for _, _, value in losses.values]
    scale = 0.1 * max(known if len(known) > 1 else [*known, 1.0])
    for step, checksum, then in losses.values:
        # not with other weights in the place of a checkpoint, such as averaged ones
        checkpoint = next((c for c in checkpoints if (c.step, c.crc32) == (step, checksum)), None)
        if checkpoint is None:
            continue
        state = checkpoint.load()
        task.load(state.parameters, state.buffers, checkpoint.step, checkpoint.epoch)
        try:
            now = float(loss_of(task, found.batch, losses.ids))
        except Exception:
            return  # the question fails with the same error, and says more about it
        if not abs(now - then) <= relative * (abs(then) + scale):
            raise ValueError(
                f"Expected the module to give the losses of the fit, got {now:.6g} for {then:.6g} on the same examples "
                f"{losses.ids} with the weights of step {step}, in eval mode{what}. It was built with other arguments "
                "than in the fit (a weight in the loss, label smoothing), its code has changed, or its step reads "
                "something of its Trainer or DataModule that is absent here. Build it as it was trained, and pass "
                f"`trainer=` or `datamodule=` where the step reads them. {_ANYWAY}"
            )


def _cause(found: Mismatch, task: Task, source: Source, record: FitData) -> str:
    if found.after_loading:
        return _cause_in_hooks(task, record)
    collate = name_of(source.collate or default_collate)
    way_out = "Pass `datamodule=`, or its" if record.datamodule else "Pass the"
    if collate != record.collate:
        return (
            f"The fit's loader collated with `{record.collate}`, here it is `{collate}`. {way_out} training loader "
            "as `train=`."
        )
    if found.remade is not None and found.remade.drew:
        return "Reading them draws random numbers here, which it did not in the fit: pass them without augmentation."
    if found.batch.loaded is None and record.hooks:
        return _cause_in_hooks(task, record)
    return f"{_where(found.batch, source)} {way_out} data that were trained on, in the same order."


def _cause_in_hooks(task: Task, record: FitData) -> str:
    present = hooks_of([task.datamodule, getattr(task.trainer, "datamodule", None), task.module])
    absent = {hook: owner for hook, owner in record.hooks.items() if present.get(hook) != owner}
    if not absent:
        return (
            "The loader gives the same batch: what follows it is another (the Trainer's precision, a callback, or the "
            "arguments of a batch-transfer hook). Pass the `trainer=` and `datamodule=` of the fit."
        )
    names = " and ".join(f"`{hook}` of `{owner}`" for hook, owner in absent.items())
    way_out = "Pass `datamodule=`" if record.datamodule in absent.values() else "Pass the module that was trained"
    return f"The loader gives the same batch, which {names} changed in the fit. {way_out}, whose hooks are then called."


def _where(batch: FirstBatch, source: Source) -> str:
    """Where an example of the fit is now."""
    kind = type(source.dataset).__name__
    if isinstance(source.dataset, Subset):
        kind += ": `random_split` draws other parts without the same `generator=`"
    known = batch.loaded if batch.loaded is not None else batch.entered
    if not splits(known):
        return f"The examples are others ({kind})."
    examples, until, looked_at = Examples(source.dataset, source.collate, 1), time.monotonic() + _SECONDS, 0
    for i in range(min(len(examples), _SEARCHED)):
        if time.monotonic() > until:
            break
        try:
            one = fingerprint(examples.one(i), 1, [0])
        except Exception:
            break
        looked_at += 1
        for k, example in enumerate(batch.some):
            if example != i and same_rows(known, one, k):
                return (
                    f"Example {example} of the fit is at index {i} here: the dataset was split, filtered or ordered in "
                    f"another way ({kind})."
                )
    return (
        f"Not all of them are among the first {looked_at} examples here: the rows are others, or were edited ({kind})."
    )
