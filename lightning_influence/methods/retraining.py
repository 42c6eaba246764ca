"""The kind of method that retrains models, and its estimates with standard errors."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.methods.kinds import ForwardOnly
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.setting.samples import Samples
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.setting.trained_models import TrainedModels
from lightning_influence.timing import Work
from lightning_influence.wording import counted


@dataclass(frozen=True)
class Estimate:
    """Scores with their standard errors.

    Args:
        values: scores, [query, train], positive for proponents; NaN where unknown.
        standard_errors: [query, train]; NaN with fewer than two models to compare; None if the values are exact.
        n_in: number of models (or marginal contributions) with the example, [train].
        n_out: number of models without the example, [train].
        n_models: number of models in all.
    """

    values: Tensor
    standard_errors: Tensor | None
    n_in: Tensor
    n_out: Tensor
    n_models: int


class Retraining(ForwardOnly):
    """Compares models trained on parts of the data. Scores that are unknown are NaN."""

    needs: ClassVar[Evidence] = Evidence.REFIT

    @abstractmethod
    def estimate(self, setting: Setting, queries: Queries) -> Estimate:
        """Scores of all training examples with their standard errors, both [query, train]."""

    def models(self, setting: Setting) -> tuple[Tensor, list[int]]:
        """The models that an estimate compares: which training examples each is trained on, and its seed.

        For the estimate of the cost; by default none are counted.

        Returns:
            [model, train] bool, and the seeds.
        """
        return torch.zeros(0, setting.n_train, dtype=torch.bool), []

    def work(self, setting: Setting, queries: Queries | None) -> list[Work]:
        """Training the models that do not exist yet, and forward passes of the queries under each."""
        forward, asked = Samples.of(setting).forward, setting.n_train if queries is None else len(queries.ids)
        membership, seeds = (None, [0]) if setting.models is None else self.models(setting)  # refused without models
        trained = 0.0 if setting.models is None or membership is None else setting.models.seconds(membership, seeds)
        return [Work("training models", 1, trained), Work("forward passes", len(seeds) * asked, forward)]

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """The values of ``estimate``, [query, train]."""
        found = self.estimate(setting, queries)
        report(self, setting, found)
        return found.values

    def follows_batch_index(self) -> bool:
        """True: models are trained as in the fit."""
        return True

    def unit(self, setting: Setting) -> str:
        """That of the query's loss or measurement."""
        return "query loss (or measurement)"


def report(method: Method, setting: Setting, found: Estimate) -> None:
    """Adds notes and diagnostics on how far to trust an estimate."""
    chosen = method.scored(setting.n_train)
    values = found.values if chosen is None else found.values[:, list(chosen)]
    unknown = int(values.isnan().all(0).sum())
    if unknown:
        setting.note(f"{unknown} of {counted(values.shape[1], 'training example', 'has')} no known score (NaN).")
    setting.diagnostic("models", found.n_models)
    if found.standard_errors is not None:
        known = found.standard_errors[~found.standard_errors.isnan()]
        if known.numel():
            setting.diagnostic("standard_error_median", float(known.median()))
            spread = found.values[~found.values.isnan()].std() if known.numel() > 1 else torch.tensor(torch.nan)
            if float(spread) < 2 * float(known.median()):
                setting.note(
                    f"The scores' standard deviation is {float(spread):.3g}, their median standard error "
                    f"{float(known.median()):.3g}: the differences between scores are largely noise. Train more models."
                )


def losses_of(setting: Setting, queries: Queries, membership: Tensor, seeds: list[int]) -> Tensor:
    """Losses of the queries, [model, query]; missing models are trained, failures are noted."""
    models = models_of(setting)
    for note in models.train(membership, seeds):
        setting.note(note)
    return models.losses(membership, seeds, queries)


def models_of(setting: Setting) -> TrainedModels:
    """The models of the attributor's ``refit``."""
    assert setting.models is not None, "the attributor refuses methods that retrain without `refit`"
    return setting.models
