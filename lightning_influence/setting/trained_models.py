"""What a question sees of models that were retrained on parts of the data."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lightning_influence.setting.setting import Queries


class TrainedModels(Protocol):
    """Models retrained on parts of the data. ``refit.Models`` implements this."""

    @property
    def seeded(self) -> bool:
        """Whether models trained on the same subset differ by their seed."""

    def train(self, membership: Tensor, seeds: Sequence[int]) -> list[str]:
        """Train the models that do not exist yet.

        Args:
            membership: [model, train] bool, the subset that each model is trained on.
            seeds: of each model.

        Returns:
            Notes about the models that could not be trained.
        """

    def seconds(self, membership: Tensor, seeds: Sequence[int]) -> float:
        """Estimate the seconds of training those of the models that do not exist yet."""

    def losses(self, membership: Tensor, seeds: Sequence[int], queries: Queries) -> Tensor:
        """Losses, [model, query] float64; NaN for a model that could not be trained."""

    def untrained(self, seeds: Sequence[int], queries: Queries) -> Tensor:
        """Losses before any training, [seed, query] float64."""
