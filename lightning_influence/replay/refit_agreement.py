"""How well scores predict refits without some examples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_influence.replay.replay import Replay
from lightning_influence.replay.vectorized import run_many
from lightning_influence.setting.losses import losses_under
from lightning_influence.setting.setting import Queries

_LEFT_OUT = 0.1


def removals(n_train: int, count: int, seed: int = 0) -> Tensor:
    """[removal, train] float64: 0 for a random tenth of the examples, at least one, and 1 for the others."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.ones(count, n_train, dtype=torch.float64)
    for row in weights:
        row[torch.randperm(n_train, generator=draw)[: max(1, round(n_train * _LEFT_OUT))]] = 0
    return weights


class Refits:
    """Refits of the captured fit under several weights of its examples, to compare scores with.

    Args:
        replay: the fit.
        weights: [removal, train].
        renormalize: divide a micro-batch's loss by the sum of its weights in place of its size.
        done: called with the number of refits that were just finished.
    """

    def __init__(
        self, replay: Replay, weights: Tensor, renormalize: bool, done: Callable[[int], Any] = lambda fits: None
    ) -> None:
        like = next(iter(replay.engine.task.named_parameters().values()))
        self._weights = weights
        self._models = run_many(replay, weights.to(like), renormalize, done)

    def agreement(self, scores: Tensor, queries: Queries) -> float:
        """Correlation over the removals between a query's loss and its prediction by the scores, mean over the queries.

        Args:
            scores: [query, train].
            queries: of these scores.

        Returns:
            From -1 to 1; NaN where all losses or all predictions are the same for every removal.
        """
        models = [{name: of_all[k] for name, of_all in self._models.items()} for k in range(len(self._weights))]
        true = losses_under(models, queries)
        predicted = (1 - self._weights) @ scores.detach().cpu().double().T
        true, predicted = true - true.mean(0), predicted - predicted.mean(0)
        size = true.norm(dim=0) * predicted.norm(dim=0)
        varies = size > 0
        return float(((true * predicted).sum(0)[varies] / size[varies]).mean())
