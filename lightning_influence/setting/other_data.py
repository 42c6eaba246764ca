"""Why a batch of a fit is another one now (hooks, collate function, data, their order), and the way out."""

import time

from torch.utils.data import Subset, default_collate

from lightning_influence.data.examples import Examples
from lightning_influence.data.source import Source
from lightning_influence.module.data_hooks import hooks_of
from lightning_influence.module.task import Task
from lightning_influence.setting.made_again import Mismatch
from lightning_influence.trajectory.fingerprints import fingerprint, same_rows, splits
from lightning_influence.trajectory.fit_data import FirstBatch, FitData, name_of

# How long, and among how many examples, one that is not where it was is searched.
_SECONDS, _SEARCHED = 1.0, 20_000


def cause_of(found: Mismatch, task: Task, source: Source, record: FitData) -> str:
    """Why a batch is not what it was, and what to pass instead."""
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
