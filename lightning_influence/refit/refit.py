"""`Refit`: retrains models on subsets of the training data and keeps them on disk."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_fraction, check_integer, one_of
from lightning_influence.data.source import Source, source_of
from lightning_influence.hints import Hinted
from lightning_influence.module.task import Loss
from lightning_influence.numerics import subsets
from lightning_influence.processes import Processes
from lightning_influence.refit.bank import Bank
from lightning_influence.refit.fixed import Fixed
from lightning_influence.refit.independent import Independent
from lightning_influence.refit.models import Models, TrainingBackend
from lightning_influence.refit.recipe import Recipe
from lightning_influence.setting.session import Session
from lightning_influence.setting.setting import Queries
from lightning_influence.types import MissingEvidence

# Subsets for evaluation are drawn with other seeds than those that a method estimates from.
_FIRST_SEED = 10**6


@dataclass(frozen=True)
class Subject:
    """What is retrained: an attributor's module, data and fit."""

    session: Session
    train: Source
    processes: Processes


class Refit(Hinted):
    """How models are retrained, for methods that need it and for evaluating scores against the truth.

    Args:
        make_module: returns a new LightningModule; for ``seeds="independent"``.
        make_trainer: returns a new Trainer, preferably without logger and checkpoints.
        make_dataloader: returns the training loader of a ``Subset`` of the training data.
        seeds: ``"fixed"``: replay the captured run step by step with the weight of what is left out set to 0; needs no
            factories. ``"independent"``: train each model from its own seed with the user's Trainer.
        dirpath: where finished models are kept; a restart continues there. None: in the captured run's folder.
        removal: for fixed seeds: ``"downweight"`` keeps the divisor of a batch's loss, ``"renormalize"`` divides by the
            number of examples that remain.
        n_jobs: processes, for independent seeds. None: those of a ``joblib.parallel_config`` around the call (Dask and
            Ray are joblib backends), otherwise only this process.

    Raises:
        ValueError: another value; factories that are missing, or given where none are needed.

    Example:
        >>> refit = Refit(make_module, make_trainer, make_loader, "independent", "bank")  # doctest: +SKIP
        >>> attributor = Attributor(model, train=train_dataset, refit=refit)  # doctest: +SKIP
        >>> attributor.score(Downsampling(n_models=200), queries=test_dataset)  # doctest: +SKIP
    """

    def __init__(
        self,
        make_module: Callable[[], Any] | None = None,
        make_trainer: Callable[[], Any] | None = None,
        make_dataloader: Callable[[Any], Any] | None = None,
        seeds: Literal["fixed", "independent"] = "fixed",
        dirpath: str | PathLike[str] | None = None,
        removal: Literal["downweight", "renormalize"] = "downweight",
        n_jobs: int | None = None,
    ) -> None:
        one_of("seeds", seeds, ("fixed", "independent"))
        one_of("removal", removal, ("downweight", "renormalize"))
        factories = {"make_module": make_module, "make_trainer": make_trainer, "make_dataloader": make_dataloader}
        given = [name for name, value in factories.items() if value is not None]
        if seeds == "independent" and len(given) < 3:
            raise ValueError(
                f"Expected `make_module`, `make_trainer` and `make_dataloader` for `seeds='independent'`, got "
                f"{', '.join(given) or 'none'}."
            )
        if seeds == "fixed" and given:
            raise ValueError(
                f"Expected no factories for `seeds='fixed'`, which replays the captured run, got {', '.join(given)}. "
                "Leave them out, or pass `seeds='independent'`."
            )
        self.factories = factories
        self.seeds, self.removal, self.n_jobs = seeds, removal, n_jobs
        self.dirpath = None if dirpath is None else Path(dirpath)
        self._subject: Subject | None = None
        self._models: Models | None = None
        self.asked: Source | None = None
        """The queries that the attributor last scored."""

    def __repr__(self) -> str:
        return f"Refit(seeds={self.seeds!r}, removal={self.removal!r})"

    def attach(self, session: Session, train: Source, processes: Processes) -> None:
        """Set what is retrained, and by which processes; ``Attributor(refit=)`` calls this."""
        self._subject, self._models, self.asked = Subject(session, train, processes), None, None

    @property
    def models(self) -> Models:
        """The models trained so far, and the backend that trains more.

        Raises:
            MissingEvidence: this was passed to no ``Attributor``, or has fixed seeds without a captured run.
            ValueError: there is no folder for the models, or it holds models of something else.
        """
        if self._models is None:
            what = self._subject_or_raise()
            about = self._backend(what), what.train, self._folder(what), what.session.trainer, what.processes
            self._models = Models(*about)
        return self._models

    @contextlib.contextmanager
    def _opened(self, queries: Any, measurement: Loss | None = None) -> Iterator[Queries]:
        """The queries, to be measured under any model of this module while the context lasts."""
        subject = self._subject_or_raise()
        source = source_of(queries, "queries", like=subject.train)
        with subject.session.open(source, measurement, gradients=False) as setting:
            assert setting.queries is not None
            yield setting.queries

    def bank(
        self,
        queries: Any,
        n_subsets: int = 100,
        fraction: float = 0.5,
        n_seeds: int = 1,
        leave_out: Sequence[int] | None = None,
        measurement: Loss | None = None,
        higher_is_better: bool = False,
        seed: int = 0,
    ) -> Bank:
        """Train models on subsets of the data and measure queries under them, for ``metrics.evaluate``.

        Args:
            queries: Dataset or DataLoader.
            n_subsets: number of random subsets, all of the same size.
            fraction: of the training data in each subset.
            n_seeds: models per subset; with more than one, the noise of the truth can be estimated.
            leave_out: instead of random subsets, one subset per id, with all examples but that one.
            measurement: ``(module, batch) -> [batch]`` instead of the loss.
            higher_is_better: whether a higher measurement is better.
            seed: of the random subsets, which differ from those of ``Downsampling`` under the same seed.

        Returns:
            Losses of the queries by subset and seed.

        Raises:
            ValueError: a fraction outside (0, 1), ids outside the data, a number of subsets or seeds below 1.
            RuntimeError: no model could be trained.
        """
        n_train = len(self._subject_or_raise().train.dataset)
        membership = _membership(n_train, n_subsets, fraction, leave_out, seed)
        sign = -1.0 if higher_is_better else 1.0
        return self._bank(membership, queries, n_seeds, leave_out is not None, measurement, sign)

    def without(self, ids: Tensor, queries: Any = None, n_seeds: int = 1) -> Bank:
        """A bank whose k-th subset leaves out the examples in the k-th row, for ``metrics.subset_removal``.

        Args:
            ids: [subset, left out] training ids.
            queries: Dataset or DataLoader; None: those that the attributor last scored.
            n_seeds: models per subset; the models trained on everything have the same seeds.

        Returns:
            Losses of the queries by subset and seed.

        Raises:
            ValueError: no queries.
        """
        n_train = len(self._subject_or_raise().train.dataset)
        queries = self.asked if queries is None else queries
        if queries is None:
            raise ValueError("Expected `queries`, got None, and none were scored before. Pass their dataset.")
        membership = torch.ones(len(ids), n_train, dtype=torch.bool).scatter_(1, ids, False)
        return self._bank(membership, queries, n_seeds, True, None, 1.0)

    def _bank(
        self, membership: Tensor, queries: Any, n_seeds: int, paired: bool, measurement: Loss | None, sign: float
    ) -> Bank:
        """Trains and measures; if ``paired``, every subset has the same seeds as the models trained on everything."""
        check_integer("n_seeds", n_seeds)
        subject = self._subject_or_raise()
        with subject.processes.together():
            models, n_train = self.models, membership.shape[1]
            n_seeds = n_seeds if models.seeded else 1
            everything = torch.ones(n_seeds, n_train, dtype=torch.bool)
            rows = membership.repeat_interleave(n_seeds, 0)
            # In a difference of models of the same seed, the seed's own effect largely cancels.
            seeds = (
                list(range(n_seeds)) * len(membership) if paired else [_FIRST_SEED + row for row in range(len(rows))]
            )
            notes = models.train(torch.cat([everything, rows]), [*range(n_seeds), *seeds])
            with self._opened(queries, measurement) as opened:
                losses = sign * models.losses(rows, seeds, opened[:])
                full = sign * models.losses(everything, list(range(n_seeds)), opened[:])
            with self._opened(subject.train) as opened:
                train_losses = models.losses(everything[:1], [0], opened[:])[0]
        return Bank(
            membership=membership,
            losses=losses.reshape(len(membership), n_seeds, -1),
            full=full,
            query_ids=torch.arange(losses.shape[1]),
            deterministic=not models.seeded,
            train_losses=train_losses,
            notes=tuple(notes),
        )

    def _backend(self, subject: Subject) -> TrainingBackend:
        if self.seeds == "independent":
            recipe = Recipe(**self.factories, dataset=subject.train.dataset)  # type: ignore[arg-type]
            return Independent(recipe, self.n_jobs)
        if subject.session.trajectory is None:
            raise MissingEvidence(
                "Expected a captured run for `seeds='fixed'`, got `trajectory=None`. Fit with "
                "`Trainer(callbacks=[Influence()])`, or pass factories and `seeds='independent'`."
            )
        return Fixed(subject.session, subject.session.trajectory, self.removal)

    def _folder(self, subject: Subject) -> Path:
        if self.dirpath is not None:
            return self.dirpath
        path = None if subject.session.trajectory is None else subject.session.trajectory.path
        if path is None:
            raise ValueError("Expected `dirpath` for the models where there is no captured run, got None.")
        return path / f"refit-{self.seeds}"

    def _subject_or_raise(self) -> Subject:
        if self._subject is None:
            raise MissingEvidence(
                "Expected a `Refit` of an attributor, got one that no attributor has. Pass it to "
                "`Attributor(model, train, trajectory, refit=refit)` first."
            )
        return self._subject


def _membership(n_train: int, n_subsets: int, fraction: float, leave_out: Sequence[int] | None, seed: int) -> Tensor:
    if leave_out is not None:
        ids = torch.as_tensor(leave_out, dtype=torch.int64)
        wrong = ids[(ids < 0) | (ids >= n_train)].tolist()
        if wrong or not len(ids):
            raise ValueError(f"Expected `leave_out` to be ids below {n_train}, got {wrong[:5] or 'none'}.")
        return subsets.without_each(n_train, ids)
    check_integer("n_subsets", n_subsets)
    check_fraction("fraction", fraction)
    return subsets.fixed_size(n_train, n_subsets, max(1, round(fraction * n_train)), seed + _FIRST_SEED)
