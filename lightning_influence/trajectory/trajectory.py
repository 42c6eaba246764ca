"""The evidence that a method works from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lightning_influence.trajectory import exposure as _exposure
from lightning_influence.trajectory.checkpoint import Checkpoint, is_decoupled, is_plain_sgd
from lightning_influence.trajectory.files import STEPS
from lightning_influence.trajectory.lightning_files import read_lightning_files
from lightning_influence.trajectory.run import Run, find_run, read_run


@dataclass(frozen=True)
class Trajectory:
    """What a fit left on disk. Make one with ``load`` or ``from_checkpoints``.

    ``steps`` has one row per optimizer step (empty where no fit was captured); ``parameter_groups`` says in which
    group, counted over all optimizers, each parameter was trained (parameters frozen, added or moved on the way have
    groups of their own); ``fit_seconds`` lasts up to the last write.
    """

    path: Path | None
    checkpoints: Sequence[Checkpoint]
    dataset_size: int | None
    steps: pa.Table = field(repr=False)
    settings: Sequence[dict[str, Any]] = field(repr=False)
    notes: tuple[str, ...] = ()
    finished: bool = True
    fit_seconds: float | None = None
    eval_modules: tuple[str, ...] = ()
    _stored_rates: Sequence[Sequence[float]] | None = field(default=None, repr=False)

    @classmethod
    def load(cls, dirpath: str | PathLike[str]) -> "Trajectory":
        """Read the newest run in a folder, or a run's own folder, with the runs that it was resumed from.

        Raises:
            MissingEvidence: there is no run, or a file of it is gone or damaged.
        """
        folder, notes = find_run(Path(dirpath))
        run = read_run(folder)
        return cls(
            path=folder,
            checkpoints=tuple(run.checkpoints),
            dataset_size=run.dataset_size,
            steps=run.steps,
            settings=tuple(run.settings),
            notes=(*notes, *run.notes, *_loose_ends(run)),
            finished=run.finished,
            fit_seconds=run.seconds,
            eval_modules=run.eval_modules,
        )

    @classmethod
    def from_checkpoints(
        cls,
        paths: Sequence[str | PathLike[str]],
        learning_rates: float | Sequence[float | Sequence[float]] | None = None,
    ) -> "Trajectory":
        """Read a run trained before anyone thought of influence: Lightning's ``.ckpt`` files, in any order.

        Args:
            paths: The files. Where an averaging callback wrote them, the raw weights in them are taken.
            learning_rates: What was applied: one number, or for each path a number or a list with one per group.
                None takes the stored ones, which are those of the *next* step.

        Raises:
            ValueError: no paths, or another number of learning rates.
            MissingEvidence: a file cannot be read or holds no weights or no learning rate.
        """
        found = read_lightning_files([Path(path) for path in paths], learning_rates)
        return cls(
            path=None,
            checkpoints=tuple(found.checkpoints),
            dataset_size=None,
            steps=STEPS.empty_table(),
            settings=(found.settings,),
            notes=tuple(found.notes),
            _stored_rates=tuple(tuple(rates) for rates in found.rates),
        )

    @property
    def captured(self) -> bool:
        """Whether the steps of a fit are known, and so what each of them trained."""
        return len(self.steps) > 0

    @property
    def has_batch_order(self) -> bool:
        """Whether it is known which examples stood in every step."""
        moved = self._moved
        return len(moved) > 0 and moved["ids"].null_count == 0

    @property
    def parameter_groups(self) -> Mapping[str, int]:
        """Every parameter that was trained -> its group: those that all steps treated alike share one."""
        if self._stored_rates is not None and not self._groups.of_parameter:
            return _AlwaysFirst()
        return MappingProxyType(self._groups.of_parameter)

    @property
    def n_groups(self) -> int:
        """How many of these groups there are."""
        return self._groups.count

    @property
    def adaptive(self) -> bool:
        """Whether an optimizer other than plain SGD moved the weights, which leaves TracIn's units arbitrary."""
        return any(not is_plain_sgd(group) for entry in self.settings for group in entry["groups"])

    def exposure(
        self, index: int, reduction: _exposure.Reduction, n_train: int, batches_per_epoch: int | None = None
    ) -> Tensor:
        """How strongly each example was trained on in the window that ends at a checkpoint: [group, train], float64.

        The sum over the optimizer steps after the checkpoint before, in which the example was drawn, of
        learning rate × weight in the step's gradient / (1 - momentum); its expectation where no order is known.

        Args:
            index: Which checkpoint. The only one of a trajectory stands for all steps.
            reduction: How ``training_step`` reduces the losses of a batch.
            n_train: Length of the training dataset.
            batches_per_epoch: Needed where a sum is reduced and batch sizes are unknown.

        Raises:
            ValueError: `reduction` is neither word, or a recorded index is not below `n_train`.
            MissingEvidence: batch sizes are needed and unknown.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Expected `reduction` to be 'mean' or 'sum', got {reduction!r}.")
        index = range(len(self.checkpoints))[index]
        if self._stored_rates is not None:
            return self._expected_from_files(index, reduction, n_train, batches_per_epoch)
        window = self._window(index)
        if len(self.checkpoints) == 1 and len(window) == 0:
            return torch.full((self.n_groups, n_train), 1.0 / n_train, dtype=torch.float64)
        pull = _exposure.pulls(window, self.settings, self._groups)
        if window["ids"].null_count == 0:
            return _exposure.visited(window, pull, reduction, n_train)
        return _exposure.expected(window, pull, reduction, n_train, batches_per_epoch)

    def shrinkage(self, index: int) -> Tensor:
        """Sum of learning rate × decoupled weight decay over the window that ends at a checkpoint: [group], float64.

        Zero under other optimizers than AdamW, and where the steps of a fit were not captured.
        """
        total, window = np.zeros(self.n_groups), self._window(range(len(self.checkpoints))[index])
        for entry, rates in zip(window["settings"].to_pylist(), window["lr"].to_pylist(), strict=True):
            made = self.settings[entry]
            decays = [float(g.get("weight_decay") or 0.0) * is_decoupled(made, g) for g in made["groups"]]
            total += self._groups.spread(entry, np.multiply(rates, decays))
        return torch.from_numpy(total)

    def learning_rates(self, index: int) -> list[float]:
        """Per flat group, what the last step at or before a checkpoint applied (the initial one: the first step)."""
        index = range(len(self.checkpoints))[index]
        if self._stored_rates is not None:
            return list(self._stored_rates[index])
        groups, moved = self._groups, self._moved
        step, optimizer_of = self.checkpoints[index].step, [entry["optimizer"] for entry in self.settings]
        applied: dict[int, Any] = {}
        columns = zip(*(moved[name].to_pylist() for name in ("step", "settings", "lr")), strict=True)
        for made, entry, rates in columns:
            if made <= step or optimizer_of[entry] not in applied:
                applied[optimizer_of[entry]] = groups.spread(entry, rates)
        return [float(rate) for rate in sum(applied.values(), np.zeros(groups.count))]

    @cached_property
    def _groups(self) -> _exposure.ParameterGroups:
        return _exposure.ParameterGroups.of(self.settings)

    @property
    def _moved(self) -> pa.Table:
        return self.steps.filter(pc.invert(self.steps["skipped"]))

    def _window(self, index: int) -> pa.Table:
        moved = self._moved
        if len(self.checkpoints) == 1:
            return moved
        after = self.checkpoints[index - 1].step if index else -1
        return moved.filter((pc.field("step") > after) & (pc.field("step") <= self.checkpoints[index].step))

    def _expected_from_files(self, index: int, reduction: str, n_train: int, batches: int | None) -> Tensor:
        after = self.checkpoints[index - 1].step if index else 0
        steps = self.checkpoints[index].step - after
        rates = torch.tensor(self.learning_rates(index), dtype=torch.float64)
        if len(self.checkpoints) == 1 and steps == 0:
            return torch.full((self.n_groups, n_train), 1.0 / n_train, dtype=torch.float64)
        if reduction == "sum" and batches is None:
            raise ValueError(
                "Expected `batches_per_epoch` for a loss with `reduction='sum'` where no batch order is known,"
                " got None."
            )
        gains = torch.tensor([_exposure.gain(group) for group in self.settings[0]["groups"]], dtype=torch.float64)
        visits = steps / (n_train if reduction == "mean" else batches)  # type: ignore[operator]
        return (rates * gains * visits)[:, None].repeat(1, n_train)


class _AlwaysFirst(Mapping[str, int]):
    """One group for every parameter: a ``.ckpt`` names none, and needs none where there is one learning rate."""

    def __getitem__(self, name: str) -> int:
        return 0

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __contains__(self, name: object) -> bool:
        return True


def _loose_ends(run: Run) -> list[str]:
    notes = []
    last = run.checkpoints[-1].step if run.checkpoints else 0
    behind = pc.sum(pc.and_(pc.greater(run.steps["step"], last), pc.invert(run.steps["skipped"]))).as_py() or 0
    if behind and len(run.checkpoints) != 1:
        notes.append(f"{behind} steps after the last checkpoint (step {last}) count for no checkpoint.")
    if not run.finished:
        notes.append("The fit did not finish: this is what was whole on disk.")
    return notes
