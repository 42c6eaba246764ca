"""Whether the data of a question are those of the fit: a few of its batches are made again and compared."""

from collections.abc import Sequence

import torch

from lightning_influence.data.source import Source
from lightning_influence.module.task import Task
from lightning_influence.setting.checkpoints import put_in_place
from lightning_influence.setting.made_again import first_mismatch, loss_of, remade
from lightning_influence.setting.other_data import cause_of
from lightning_influence.trajectory import Checkpoint, Trajectory
from lightning_influence.trajectory.fingerprints import difference
from lightning_influence.trajectory.fit_data import FitData
from lightning_influence.trajectory.numbering import combines_loaders

# Others than the few examples of each batch are compared for so long.
_SECONDS_FOR_OTHERS = 0.02
# Checkpoints whose losses are compared, beside the last one, have at most this many bytes together.
CHECKPOINT_BYTES = 2**25
_ANYWAY = "To score these data all the same, pass `Attributor(check_data=False)`."


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
        cause = cause_of(found, task, source, record)
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
        put_in_place(task, checkpoint)
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
