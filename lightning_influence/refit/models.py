"""Models trained on subsets of the data: missing ones are trained, and queries are measured under all of them."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset, TensorDataset

from lightning_influence.data.source import Source
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.processes import Processes
from lightning_influence.progress import progress
from lightning_influence.refit.pool import Failure, Job, described
from lightning_influence.refit.store import ModelStore, TrainedModel, bytes_of, key_of, layout_of
from lightning_influence.setting.losses import losses_under
from lightning_influence.setting.setting import Queries
from lightning_influence.wording import counted

_FINGERPRINTED = 17  # examples that are hashed to recognise a dataset


class TrainingBackend(Protocol):
    """How models are retrained: by replaying the captured run, or by the user's own Trainer."""

    seeded: bool
    """Whether a seed makes a difference."""

    def identity(self) -> dict[str, Any]:
        """What distinguishes its models from those of another backend or configuration, as JSON."""

    def initial(self, seed: int) -> dict[str, Tensor]:
        """The weights of the untrained model of a seed."""

    def train_all(
        self, jobs: Sequence[Job], take: Callable[[Sequence[TrainedModel]], None], done: Callable[[int], Any]
    ) -> list[Failure]:
        """Trains models, passes them to ``take`` as they are finished, and returns the jobs that failed for good.

        ``done`` is called with the number of models that were just finished, or were taken as far as so many are.
        """

    def seconds(self, jobs: Sequence[Job]) -> float:
        """Estimate the seconds of training models, by parts of them."""


class Models:
    """A folder of models of one training set, and the backend that trains more of them.

    Args:
        backend: how a model is trained.
        train: the training data.
        folder: where models are kept.
        trainer: progress is shown if its progress bar is enabled.
        processes: that share the models: each trains some, and has the queries' losses under all.
    """

    def __init__(
        self, backend: TrainingBackend, train: Source, folder: Path, trainer: Any, processes: Processes
    ) -> None:
        self.backend, self.processes = backend, processes
        self.n_train = len(train.dataset)
        self._trainer = trainer
        self._labels = _labels(train.dataset)
        identity = {"n_train": self.n_train, "dataset": _fingerprint(train), **backend.identity()}
        self.store = ModelStore(folder, identity, layout_of(backend.initial(0)), processes)

    @property
    def seeded(self) -> bool:
        """Whether models of one subset differ by their seed."""
        return self.backend.seeded

    def train(self, membership: Tensor, seeds: Sequence[int]) -> list[str]:
        """Trains the models that are not in the folder yet.

        Args:
            membership: [model, train] bool.
            seeds: one per model; ignored where a seed makes no difference.

        Returns:
            What a reader of results must know: which models failed, which subsets lack a class.

        Raises:
            ValueError: a subset without any example, or of another dataset.
            RuntimeError: another process trains into the same folder; workers keep dying; every model failed.
        """
        self._check(membership)
        with self.processes.together(), self.store.writing():
            jobs = [job for key, job in self._jobs(membership, seeds).items() if key not in self.store]
            if not jobs:
                return self._missing_classes(membership)
            own = jobs[self.processes.rank :: self.processes.count]
            with progress(self._trainer, len(own), "retraining", unit="model") as done:
                failures = self.backend.train_all(own, self.store.add, done) if own else []
            failures = [failure for some in self.processes.gathered(failures) for failure in some]
        if len(failures) == len(jobs):
            raise RuntimeError(
                f"Expected models that train, got {counted(len(jobs), 'failure')}. {described(failures[0])}"
            )
        notes = [f"{described(failure)} (twice): it is left out." for failure in failures]
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return notes + self._missing_classes(membership)

    def seconds(self, membership: Tensor, seeds: Sequence[int]) -> float:
        """Estimate the seconds of training the models that are not in the folder yet."""
        jobs = [job for key, job in self._jobs(membership, seeds).items() if key not in self.store]
        return self.backend.seconds(jobs) if jobs else 0.0

    def losses(self, membership: Tensor, seeds: Sequence[int], queries: Queries) -> Tensor:
        """[model, query]: losses in float64, by forward passes; NaN for a model that could not be trained."""
        keys = [key_of(row, seed) for row, seed in zip(membership, self._seeds(seeds), strict=True)]
        trained = list(dict.fromkeys(key for key in keys if key in self.store))
        rows = {key: row for row, key in enumerate(trained)}
        own = self.processes.share(len(trained))
        with progress(self._trainer, len(own), "queries under retrained models", unit="model") as done:
            found = losses_under(_ticking(self.store.weights(trained[own.start : own.stop]), done), queries)
        found = self._of_all(found, len(trained))
        missing = torch.full((1, len(queries)), torch.nan, dtype=torch.float64)
        every = torch.cat([found, missing])
        return every[[rows.get(key, len(found)) for key in keys]]

    def untrained(self, seeds: Sequence[int], queries: Queries) -> Tensor:
        """[seed, query]: losses under the untrained models."""
        return self._of_all(losses_under((self.backend.initial(seed) for seed in self._seeds(seeds)), queries))

    def _of_all(self, losses: Tensor, count: int = 0) -> Tensor:
        """The shares of rows as one, or the first process's: all decide by the same numbers what to train next."""
        shared = self.processes.shares(count)
        return self.processes.joined(losses, count) if shared else self.processes.from_rank(losses)

    def _seeds(self, seeds: Sequence[int]) -> list[int]:
        return list(seeds) if self.backend.seeded else [0] * len(seeds)

    def _jobs(self, membership: Tensor, seeds: Sequence[int]) -> dict[str, Job]:
        pairs = zip(membership, self._seeds(seeds), strict=True)
        return {key_of(row, seed): (row, seed) for row, seed in pairs}

    def _check(self, membership: Tensor) -> None:
        if membership.ndim != 2 or membership.shape[1] != self.n_train:
            raise ValueError(
                f"Expected `membership` to be [model, train] with {self.n_train} training examples, got "
                f"{list(membership.shape)}."
            )
        empty = int((membership.sum(1) == 0).sum())
        if empty:
            raise ValueError(
                f"Expected subsets with at least one example, got {empty} empty ones of {len(membership)}. Draw larger "
                "subsets; the value of the empty set is `DataShapley(empty=)`."
            )

    def _missing_classes(self, membership: Tensor) -> list[str]:
        """A note per class of which some subsets hold no example, where the labels can be read from the dataset."""
        if self._labels is None:
            return []
        return [
            f"{without} of {counted(len(membership), 'subset', 'holds')} no example of class {label}."
            for label in self._labels.unique().tolist()
            if (without := int((membership[:, self._labels == label].sum(1) == 0).sum()))
        ]


def _labels(dataset: Any) -> Tensor | None:
    """[train]: integer labels, if the dataset is a ``TensorDataset`` or has ``targets``; otherwise None."""
    if isinstance(dataset, Subset):
        inner = _labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices))]
    found = dataset.tensors[-1] if isinstance(dataset, TensorDataset) else getattr(dataset, "targets", None)
    try:
        labels = torch.as_tensor(found).cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = labels.ndim == 1 and len(labels) == len(dataset) and not labels.is_floating_point()
    return labels if whole else None


def _ticking(models: Iterable[dict[str, Tensor]], done: Callable[[int], Any]) -> Iterator[dict[str, Tensor]]:
    """The models, of which each is counted once the next is asked for."""
    for model in models:
        yield model
        done(1)


def _fingerprint(train: Source) -> str:
    """A hash of a few evenly spread examples."""
    examples, digest = train.examples(None), hashlib.sha256()
    for i in evenly_spread(len(train.dataset), _FINGERPRINTED):
        for leaf in tree_leaves(examples.one(i)):
            digest.update(bytes_of(leaf))
    return digest.hexdigest()[:24]
