"""When a fit has ended: make its first batches again, and compute a few losses, by which a later process is checked.

Here rather than during the fit, because to read examples twice and to call the step once more must not change training,
and everything that a module may keep outside of itself cannot be put back. It is done as every question does it later.
"""

import contextlib
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_influence.capture.recorder import Recorder
from lightning_influence.data.source import Source, source_of
from lightning_influence.module.quiet import quiet
from lightning_influence.module.random_state import random_states, seed_for
from lightning_influence.module.snapshot import restoring
from lightning_influence.module.task import Task
from lightning_influence.setting.checkpoints import put_in_place
from lightning_influence.setting.made_again import FEW, first_mismatch, loss_of, remade
from lightning_influence.setting.same_data import CHECKPOINT_BYTES
from lightning_influence.setting.session import fit_values
from lightning_influence.trajectory import Trajectory
from lightning_influence.trajectory.checkpoint import Checkpoint
from lightning_influence.trajectory.fingerprints import difference
from lightning_influence.trajectory.fit_data import FirstBatch, FirstLosses, FitData


def confirm_data(recorder: Recorder, trainer: Any, module: Any, run_dir: Path) -> None:
    """Keep the fingerprints of batches that can be made again, and add losses; nothing here fails the fit."""
    record = recorder.first.record(recorder.loader)
    if record is None or recorder.failed or not trainer.is_global_zero:
        return
    what = None
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = source_of(recorder.loader, "train")
        # In manual optimization a step has no loss to compare, and would train.
        loss, trajectory = None if module.automatic_optimization else _no_loss, Trajectory.load(run_dir)
        with quiet(module, loss, trainer, fit=fit_values(trajectory, given=True)) as task:
            kept, what = _made_again(task, source, record)
            losses = None
            if trainer.world_size == 1 and task.loss is None and not _compiled(module):
                with contextlib.suppress(Exception):
                    losses = _losses(task, source, recorder.first.some, trajectory)
        record = replace(record, confirmed=True, batches=kept, losses=losses)
    recorder.confirm(record, what)


def _no_loss(module: Any, batch: Any) -> torch.Tensor:
    raise NotImplementedError


def _made_again(task: Task, source: Source, record: FitData) -> tuple[tuple[FirstBatch, ...], str | None]:
    """The batches that are made again alike, and what differs in one into which nothing random goes."""
    kept, differs = [], None
    for batch in record.batches:
        found = first_mismatch(task, source, replace(record, batches=(batch,)))
        if (found is not None and found.remade is None) or _random(task, source, batch, found is None):
            continue
        if found is None:
            kept.append(batch)
        else:
            differs = differs or found.what
    return tuple(kept), differs


def _random(task: Task, source: Source, batch: FirstBatch, alike: bool) -> bool:
    """Whether making a batch uses random numbers, be it in train mode only or, if it differs, of an own generator."""
    ids = batch.few(FEW[0]).some
    with restoring(task.module.modules(), "training"):
        task.module.train()
        one = remade(task, source, ids, range(len(ids)))
        if one.drew or alike:
            return one.drew
        other = remade(task, source, ids, range(len(ids)))
    return difference(one.entered, other.entered, rows=False) is not None


def _losses(task: Task, source: Source, ids: list[int], trajectory: Trajectory) -> FirstLosses | None:
    """Losses of a few examples at the last checkpoint and, where files are small, the first and a middle one."""
    values = []
    found = remade(task, source, ids, range(len(ids)))
    task.numbers = trajectory.numbers
    for checkpoint in _chosen(trajectory):
        put_in_place(task, checkpoint)
        values.append((checkpoint.step, checkpoint.crc32, float(loss_of(task, found.batch, ids))))
    seed_for(ids[0])
    before = random_states()
    again = float(loss_of(task, found.batch, ids))
    drew = before != random_states()
    if not math.isclose(again, values[-1][2], rel_tol=1e-6):
        return None  # the step draws from a generator of its own, or counts its calls outside of the module
    dtype = str(next(iter(task.named_parameters().values())).dtype).removeprefix("torch.")
    return FirstLosses(ids, found.entered, values, dtype, drew)


def _chosen(trajectory: Trajectory) -> list[Checkpoint]:
    checkpoints = trajectory.checkpoints
    few = sorted({0, len(checkpoints) // 2, len(checkpoints) - 1})
    return [
        checkpoints[i] for i in few if i == len(checkpoints) - 1 or len(few) * checkpoints[i].size <= CHECKPOINT_BYTES
    ]


def _compiled(module: nn.Module) -> bool:
    """Whether a forward pass on another batch size may compile, which takes longer than small fits."""
    return any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
