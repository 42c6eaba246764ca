"""The record of a fit that methods work from."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lightning_influence.checks import check_path_like
from lightning_influence.hints import Hinted
from lightning_influence.trajectory import exposure as _exposure
from lightning_influence.trajectory.checkpoint import BestFile, Checkpoint, is_plain_sgd
from lightning_influence.trajectory.columns import steps_between
from lightning_influence.trajectory.file_list import Paths, files_of
from lightning_influence.trajectory.files import STEPS
from lightning_influence.trajectory.fit_data import FitData
from lightning_influence.trajectory.in_words import in_words
from lightning_influence.trajectory.lightning_files import read_lightning_files
from lightning_influence.trajectory.numbering import combines_loaders, of_loader
from lightning_influence.trajectory.optimizer_steps import expected_from_files
from lightning_influence.trajectory.parameter_groups import (
    AlwaysFirst,
    ParameterGroups,
    effective_rates,
    last_rates,
    shrinkage,
)
from lightning_influence.trajectory.run import find_run, notes_on_the_end, read_run
from lightning_influence.types import MissingEvidence


@dataclass(frozen=True)
class Trajectory(Hinted):
    """The record of a fit on disk. Make one with ``load`` or ``from_checkpoints``.

    Args:
        path: The run's folder; None for a trajectory made of ``.ckpt`` files.
        checkpoints: Weights during the fit, in the order of their steps; the first may be the initial weights.
        dataset_size: Number of training examples, where known.
        steps: One row per optimizer step: examples, learning rates, divisor and so on; empty where no fit was captured.
        settings: Optimizer options, one entry for each combination that the fit used; ``steps`` refers to them.
        notes: What a reader of scores must know about the record.
        finished: Whether the fit ran to its end.
        fit_seconds: Seconds from the start of the fit to the last write.
        eval_modules: Names of the modules that were in eval mode during training.
        averaged: The averaged weights at the end of the fit, where Lightning's EMA or SWA made some.
        best: The file that ``ModelCheckpoint`` found best.
        trainer_values: (step, values by path): what ``training_step`` read of its Trainer, each time that it changed.
        numbers: (step, value) of each of the module's plain attributes that changed during the fit, by its path.
        removed: Steps of the checkpoints that `Influence(keep_last=)` removed.
        fit_data: By what the training data are recognised in a later process; None where nothing was recorded.
        broken: Why the record ends while the fit went on, as on a full disk; None where it does not.

    Example:
        >>> trajectory = Trajectory.load("influence")  # doctest: +SKIP
        >>> trajectory.exposure(-1, "mean", n_train=60_000).shape  # [group, train]  # doctest: +SKIP
        torch.Size([1, 60000])
    """

    path: Path | None
    checkpoints: Sequence[Checkpoint]
    dataset_size: int | None
    steps: pa.Table
    settings: Sequence[dict[str, Any]]
    notes: tuple[str, ...] = ()
    finished: bool = True
    fit_seconds: float | None = None
    eval_modules: tuple[str, ...] = ()
    averaged: Checkpoint | None = None
    best: BestFile | None = None
    trainer_values: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    numbers: Mapping[str, Sequence[tuple[int, Any]]] = field(default_factory=dict)
    removed: tuple[int, ...] = ()
    fit_data: FitData | None = None
    broken: str | None = None
    _stored_rates: Sequence[Sequence[float]] | None = None
    __repr__ = in_words

    @classmethod
    def load(cls, dirpath: str | PathLike[str]) -> "Trajectory":
        """Read a run, together with the runs that it was resumed from.

        Args:
            dirpath: A run's own folder (``run-N``), or the folder that holds the runs: then the newest of them.

        Raises:
            TypeError: something else than a path.
            MissingEvidence: there is no run, or one of its files is missing or damaged.
        """
        check_path_like("dirpath", dirpath, "Pass `influence.run_dir`, or the folder that holds the runs.")
        folder, notes = find_run(Path(dirpath))
        run = read_run(folder)
        return cls(**vars(run) | {"notes": (*notes, *run.notes, *notes_on_the_end(run))})

    @classmethod
    def from_checkpoints(
        cls,
        paths: Paths,
        learning_rates: float | Sequence[float | Sequence[float]] | None = None,
        weights: Literal["raw", "averaged"] | None = None,
    ) -> "Trajectory":
        """Read a fit that was not captured, from Lightning's ``.ckpt`` files in any order.

        Nothing in the files is executed: objects other than tensors and builtins, such as those among the
        hyper-parameters, are not rebuilt. Of several files with the same weights at one step, one is used.

        Args:
            paths: The files, one file, or a folder of files.
            learning_rates: The learning rates that were applied: one number, or for each path (in a folder: for each
                step, in ascending order) a number or a list with one number per parameter group. None: those stored in
                the files, which are those of the *next* step.
            weights: In files that were written under an averaging callback (EMA, SWA): ``"raw"``, the weights at which
                the steps were made, or ``"averaged"``. None: the raw ones, with a warning if there are both.

        Raises:
            TypeError: something else than paths.
            ValueError: no paths, or another number of learning rates than of paths.
            MissingEvidence: a file cannot be read, or it does not hold these weights or no learning rate.
        """
        folder = isinstance(paths, (str, PathLike)) and os.path.isdir(paths)
        checkpoints, rates, settings, notes = read_lightning_files(files_of(paths), learning_rates, weights, folder)
        return cls(
            path=None,
            checkpoints=tuple(checkpoints),
            dataset_size=None,
            steps=STEPS.empty_table(),
            settings=(settings,),
            notes=tuple(notes),
            _stored_rates=tuple(map(tuple, rates)),
        )

    def of_loader(self, index: int) -> "Trajectory":
        """The record with the examples of one of several training loaders, whose batches were combined.

        Pass it to `Attributor` together with that loader's dataset, and `loss=`: the loss of one of its examples.

        Args:
            index: Of the loader, from 0, in the order of the list or dict.

        Raises:
            ValueError: There is no such loader.
        """
        return of_loader(self, index)

    @property
    def captured(self) -> bool:
        """Whether the optimizer steps of the fit were recorded."""
        return len(self.steps) > 0

    @property
    def has_batch_order(self) -> bool:
        """Whether it is known which examples were in every optimizer step."""
        applied = self._applied
        return len(applied) > 0 and applied["ids"].null_count == 0

    @cached_property
    def batch_indices(self) -> tuple[int, ...] | None:
        """Every index (``batch_idx``) of a batch in the fit, ascending; None where they are unknown."""
        column = self._applied["batch_idx"]
        if len(column) == 0 or column.null_count:
            return None
        return tuple(sorted(pc.unique(pc.list_flatten(column)).to_pylist()))

    def clock(self, index: int) -> dict[str, Sequence[int]]:
        """Every ``global_step`` and ``current_epoch`` since the previous checkpoint, where there are several.

        Args:
            index: Position of the checkpoint.
        """
        window = self._window(range(len(self.checkpoints))[index])
        steps = [made - 1 for made in window["step"].to_pylist()]
        numbers = {"global_step": steps, "current_epoch": window["epoch"].to_pylist()}
        own = {"global_step": self.checkpoints[index].step, "current_epoch": self.checkpoints[index].epoch}
        distinct = {name: sorted({*of_name, own[name]}) for name, of_name in numbers.items() if of_name}
        return {name: found for name, found in distinct.items() if len(found) > 1}

    @property
    def parameter_groups(self) -> Mapping[str, int]:
        """The group number of every trained parameter, counted over all optimizers.

        Parameters that all steps treated alike share a group; those that were frozen, added or moved between the
        optimizer's groups during the fit are in groups of their own.
        """
        if self._stored_rates is not None and not self._groups.of_parameter:
            return AlwaysFirst()
        return MappingProxyType(self._groups.of_parameter)

    @property
    def n_groups(self) -> int:
        """The number of groups in ``parameter_groups``."""
        return self._groups.count

    @property
    def adaptive(self) -> bool:
        """Whether an optimizer other than SGD updated the weights; the units of TracIn's scores are then arbitrary.

        A subclass of SGD with a ``step`` of its own is another one.
        """
        groups = [group for entry in self.settings for group in entry["groups"]]
        return any(entry.get("own_step") for entry in self.settings) or not all(map(is_plain_sgd, groups))

    @property
    def counts_steps(self) -> bool:
        """Whether the number of steps of each optimizer is known; if not, TracInCP's units are arbitrary."""
        return not any(entry.get("uncounted") for entry in self.settings)

    def exposure(
        self,
        index: int,
        reduction: _exposure.Reduction,
        n_train: int,
        batches_per_epoch: int | None = None,
        weights: Tensor | None = None,
        draws: _exposure.ExpectedDraws | None = None,
    ) -> Tensor:
        """How strongly each example was trained on between the previous checkpoint and this one.

        The sum of learning rate × the example's weight in the step's gradient / (1 - momentum) over the optimizer steps
        of that window in which the example was drawn; where the batch order is unknown, its expectation. In units of
        the learning rate: minus the example's loss gradient times this is the change of the weights, to first order.

        Args:
            index: Position of the checkpoint. If there is only one, its window holds all steps.
            reduction: How ``training_step`` reduces the losses of a batch.
            n_train: Length of the training dataset.
            batches_per_epoch: Required for ``reduction="sum"`` where the batch sizes are unknown.
            weights: [train]: how much each example weighs in the mean over its batch, such as its number of tokens.
            draws: How often the sampler is expected to draw each example, where the batch order is unknown.

        Returns:
            [group, train], float64.

        Raises:
            ValueError: `reduction` is neither word, or a recorded index is not below `n_train`.
            MissingEvidence: The batch sizes are required and unknown, or batches combine several loaders.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Expected `reduction` to be 'mean' or 'sum', got {reduction!r}.")
        index = range(len(self.checkpoints))[index]
        window = self._window(index)
        relative = _exposure.relative_draws(reduction, draws, weights, window)
        if self._stored_rates is not None:
            return expected_from_files(self, index, reduction, n_train, batches_per_epoch) * relative
        if combines_loaders(window):
            raise MissingEvidence(
                "Expected a fit with one training loader, got batches that combine several, whose indices are of"
                " several datasets. Choose one: `trajectory.of_loader(0)`, with its dataset as `train=` and `loss=`."
            )
        if len(self.checkpoints) == 1 and len(window) == 0:
            return torch.full((self.n_groups, n_train), 1.0 / n_train, dtype=torch.float64) * relative
        rates = effective_rates(window, self.settings, self._groups)
        if window["ids"].null_count == 0:
            return _exposure.visited(window, rates, reduction, n_train, weights)
        return _exposure.expected(window, rates, reduction, n_train, batches_per_epoch) * relative

    def visits(
        self, index: int, reduction: _exposure.Reduction, n_train: int, weights: Tensor | None = None
    ) -> _exposure.MetIndices:
        """``exposure``, apart for each index (``batch_idx``) of the batches that an example was in.

        Args:
            index: Position of the checkpoint.
            reduction: How ``training_step`` reduces the losses of a batch.
            n_train: Length of the training dataset.
            weights: As for ``exposure``.

        Returns:
            The examples' visits at each index, in units of the learning rate.
        """
        window = self._window(range(len(self.checkpoints))[index])
        rates = effective_rates(window, self.settings, self._groups)
        return _exposure.visits(window, rates, reduction, n_train, weights)

    def shrinkage(self, index: int) -> Tensor:
        """The sum of learning rate × decoupled weight decay between the previous checkpoint and this one.

        The relative amount by which weight decay alone shrank the weights, to first order. Zero for optimizers other
        than AdamW, and where the optimizer steps were not recorded.

        Args:
            index: Position of the checkpoint.

        Returns:
            [group], float64, dimensionless.
        """
        return shrinkage(self._window(range(len(self.checkpoints))[index]), self.settings, self._groups)

    def learning_rates(self, index: int) -> list[float]:
        """The learning rates that the last optimizer step up to a checkpoint applied, one per parameter group.

        For the initial weights, those of the first step.

        Args:
            index: Position of the checkpoint.

        Returns:
            [group], in the numbering of ``parameter_groups``.
        """
        index = range(len(self.checkpoints))[index]
        if self._stored_rates is not None:
            return list(self._stored_rates[index])
        return last_rates(self._applied, self.checkpoints[index].step, self.settings, self._groups)

    @cached_property
    def _groups(self) -> ParameterGroups:
        return ParameterGroups.of(self.settings)

    @cached_property
    def _applied(self) -> pa.Table:
        """The steps that changed the weights: gradient scaling skips some."""
        skipped = self.steps["skipped"]
        return self.steps.filter(pc.invert(skipped)) if pc.any(skipped).as_py() else self.steps

    def _window(self, index: int) -> pa.Table:
        applied = self._applied
        if len(self.checkpoints) == 1:
            return applied
        step = self.checkpoints[index].step
        earlier = [self.checkpoints[index - 1].step] if index else [-1]
        return steps_between(applied, max(earlier + [gone for gone in self.removed if gone < step]), step)
