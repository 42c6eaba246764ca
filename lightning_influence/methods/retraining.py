"""The kind of method that trains models again: an estimate, and how much it rests on."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.methods.kinds import ForwardOnly
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.setting.setting import Queries, Setting, TrainedModels


@dataclass(frozen=True)
class Estimate:
    """Scores with their uncertainty.

    Args:
        values: [query, train], positive for proponents; NaN where nothing is known.
        standard_errors: [query, train]; NaN with fewer than two models to compare; None: the values are exact.
        n_in: [train]: models (or marginal contributions) that the example was in.
        n_out: [train]: models that it was not in.
        n_models: models that were looked at.
    """

    values: Tensor
    standard_errors: Tensor | None
    n_in: Tensor
    n_out: Tensor
    n_models: int


class Retraining(ForwardOnly):
    """Compares models trained on parts of the data; an unknown score is NaN, never 0."""

    needs: ClassVar[Evidence] = Evidence.REFIT

    @abstractmethod
    def estimate(self, setting: Setting, queries: Queries) -> Estimate:
        """Scores with their standard errors."""

    def score(self, setting: Setting, queries: Queries) -> Tensor:
        """[query, train]: the values of ``estimate``."""
        found = self.estimate(setting, queries)
        report(self, setting, found)
        return found.values

    def unit(self, setting: Setting) -> str:
        """Of the loss or measurement."""
        return "query loss (or measurement)"


def report(method: Method, setting: Setting, found: Estimate) -> None:
    """Notes how far to trust an estimate."""
    chosen = method.scored(setting.n_train)
    values = found.values if chosen is None else found.values[:, list(chosen)]
    unknown = int(values.isnan().all(0).sum())
    if unknown:
        setting.note(f"{unknown} of {values.shape[1]} training examples have no known score (NaN).")
    setting.diagnostic("models", found.n_models)
    if found.standard_errors is not None:
        known = found.standard_errors[~found.standard_errors.isnan()]
        if known.numel():
            setting.diagnostic("standard_error_median", float(known.median()))
            spread = found.values[~found.values.isnan()].std() if known.numel() > 1 else torch.tensor(torch.nan)
            if float(spread) < 2 * float(known.median()):
                setting.note(
                    f"Scores differ by {float(spread):.3g} (standard deviation) and are known to within "
                    f"{float(known.median()):.3g} (median standard error): much of what they say is noise. Train more "
                    "models."
                )


def losses_of(setting: Setting, queries: Queries, membership: Tensor, seeds: list[int]) -> Tensor:
    """[model, query]: trains what is missing, notes what failed, measures the queries."""
    models = models_of(setting)
    for note in models.train(membership, seeds):
        setting.note(note)
    return models.losses(membership, seeds, queries)


def models_of(setting: Setting) -> TrainedModels:
    """The models that the attributor brought."""
    assert setting.models is not None, "the attributor refuses such a method without `refit`"
    return setting.models
