"""How well scores foresee what really happens without some examples: refits side by side, as far as trust goes."""

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
    """The captured fit again under several weights of its examples, to hold scores against.

    Args:
        replay: the fit.
        weights: [removal, train].
        renormalize: a micro-batch is divided by the sum of its weights in place of its size.
    """

    def __init__(self, replay: Replay, weights: Tensor, renormalize: bool) -> None:
        like = next(iter(replay.engine.task.named_parameters().values()))
        self._weights = weights
        self._models = run_many(replay, weights.to(like), renormalize)

    def agreement(self, scores: Tensor, queries: Queries) -> float:
        """Correlation over the removals of a query's loss with what the scores foresee, mean over the queries.

        Args:
            scores: [query, train].
            queries: that they are about.

        Returns:
            From -1 to 1; NaN where no query's loss or no prediction differs from removal to removal.
        """
        models = [{name: of_all[k] for name, of_all in self._models.items()} for k in range(len(self._weights))]
        true = losses_under(models, queries)
        foreseen = (1 - self._weights) @ scores.detach().cpu().double().T
        true, foreseen = true - true.mean(0), foreseen - foreseen.mean(0)
        size = true.norm(dim=0) * foreseen.norm(dim=0)
        moved = size > 0
        return float(((true * foreseen).sum(0)[moved] / size[moved]).mean())
