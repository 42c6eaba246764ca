"""LeaveOneOut: the change of a query's loss when the model is trained without an example (Cook, 1977)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.checks import check_examples, check_integer
from lightning_influence.methods.retraining import Estimate, Retraining, losses_of, models_of
from lightning_influence.numerics.subsets import without_each
from lightning_influence.setting.setting import Queries, Setting


@dataclass(frozen=True)
class LeaveOneOut(Retraining):
    r"""How much higher a query's loss is if the model is trained without the example.

    This is the truth that most other methods estimate, and costs a training run for each example.

    .. math:: s(q, z_i) = \ell(w_{-i}, q) - \ell(w, q)

    Source: Cook. Detection of Influential Observation in Linear Regression. Technometrics 1977; Koh, Liang. ICML 2017.
    Needs: ``Attributor(refit=)``.
    Units: query loss (or measurement).
    Cost: one training run per example and seed, once; more queries take forward passes only.

    Args:
        examples: ids of the training examples to leave out; None: all. The others get no scores.
        n_seeds: models per example, over which scores are averaged, with ``Refit(seeds="independent")``. For neural
            networks, a single one gives mostly noise.

    Raises:
        ValueError: ``n_seeds`` below 1; ids outside the training data.
    """

    examples: tuple[int, ...] | None = None
    n_seeds: int = 1

    def __post_init__(self) -> None:
        check_integer("n_seeds", self.n_seeds)
        object.__setattr__(self, "examples", check_examples(self.examples))

    def scored(self, n_train: int) -> Sequence[int] | None:
        """The given ``examples``, ascending.

        Raises:
            ValueError: ids outside the training data.
        """
        if self.examples is None:
            return None
        wrong = [i for i in self.examples if not 0 <= i < n_train]
        if wrong:
            raise ValueError(f"Expected `examples` to be ids below {n_train}, got {wrong[:5]!r}.")
        return self.examples

    def models(self, setting: Setting) -> tuple[Tensor, list[int]]:
        """One model with all examples and one without each, for every seed."""
        n_train, n_seeds, ids = setting.n_train, self._seeds(setting), self._left_out(setting)
        every = torch.ones(1, n_train, dtype=torch.bool)
        membership = torch.cat([every, without_each(n_train, ids)]).repeat_interleave(n_seeds, 0)
        return membership, list(range(n_seeds)) * (len(ids) + 1)

    def _seeds(self, setting: Setting) -> int:
        return self.n_seeds if models_of(setting).seeded else 1

    def _left_out(self, setting: Setting) -> Tensor:
        chosen = self.scored(setting.n_train)
        return torch.arange(setting.n_train) if chosen is None else torch.tensor(chosen, dtype=torch.int64)

    def estimate(self, setting: Setting, queries: Queries) -> Estimate:
        """Scores, with standard errors over seeds."""
        n_train, n_seeds, ids = setting.n_train, self._seeds(setting), self._left_out(setting)
        membership, seeds = self.models(setting)
        losses = losses_of(setting, queries, membership, seeds).reshape(len(ids) + 1, n_seeds, -1)
        change = losses[1:] - losses[:1]  # of models of the same seed, whose own effect largely cancels
        values = _spread(change.nanmean(1).T, ids, n_train)
        errors = None
        if models_of(setting).seeded:
            spread = change.std(1) if n_seeds > 1 else torch.full_like(change[:, 0], torch.nan)
            errors = _spread(spread.T / n_seeds**0.5, ids, n_train)
        out = torch.zeros(n_train, dtype=torch.int64)
        out[ids] = n_seeds
        return Estimate(values, errors, len(membership) - out, out, len(membership))


def _spread(columns: Tensor, ids: Tensor, n_train: int) -> Tensor:
    """Places columns at the given ids, [query, train]; the other columns are NaN."""
    return torch.full((len(columns), n_train), torch.nan, dtype=columns.dtype).index_copy(1, ids, columns)
