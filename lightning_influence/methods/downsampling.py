"""Downsampling: a query's mean loss without and with an example, over random subsets (Feldman and Zhang, 2020)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_influence.checks import check_fraction, check_integer, one_of
from lightning_influence.methods.retraining import Estimate, Retraining, losses_of, report
from lightning_influence.numerics.subsets import bernoulli, fixed_size
from lightning_influence.setting.setting import Queries, Setting


@dataclass(frozen=True)
class Downsampling(Retraining):
    r"""The mean loss of a query under models trained without the example, minus the mean under models with it.

    .. math:: s(q, z_i) = \operatorname{mean}_{S \not\ni i} \ell(w_S, q) - \operatorname{mean}_{S \ni i} \ell(w_S, q)

    The models are trained on random subsets S. Self-influence, the same with the example as the query, measures how far
    the example is memorised. With subsets of one size, the scores of a query sum to zero if its loss is a sum of one
    term per training example; with ``sampling="bernoulli"`` and ``fraction=0.5`` the estimate is the Data Banzhaf value
    (Wang, Jia. AISTATS 2023).

    Source: Feldman, Zhang. What Neural Networks Memorize and Why. NeurIPS 2020.
    Needs: ``Attributor(refit=)``.
    Units: query loss (or measurement).
    Cost: ``n_models`` training runs, once; more queries take forward passes only.

    Args:
        n_models: number of subsets, with one model each.
        fraction: of the training data in each subset.
        sampling: ``"fixed"``: all subsets have the same size; ``"bernoulli"``: each example is drawn independently.
        seed: of the random subsets; the k-th model is trained with seed k.

    Raises:
        ValueError: other values.
    """

    n_models: int = 100
    fraction: float = 0.5
    sampling: Literal["fixed", "bernoulli"] = "fixed"
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("sampling", self.sampling, ("fixed", "bernoulli"))
        check_integer("n_models", self.n_models, least=2)
        check_fraction("fraction", self.fraction)

    def estimate(self, setting: Setting, queries: Queries) -> Estimate:
        """Scores, with standard errors over models."""
        return with_and_without(*self._trained(setting, queries))

    def self_influence(self, setting: Setting) -> Tensor:
        """The memorisation of each training example, [train].

        Raises:
            ValueError: examples that are in all subsets, or in none.
        """
        train = Queries(setting.engine, setting.examples, range(setting.n_train))
        found = with_and_without(*self._trained(setting, train), own=True)
        unknown = found.values[0].isnan().nonzero()[:, 0].tolist()
        if unknown:
            raise ValueError(
                f"Expected each training example to be in some subsets and not in others, got {unknown[:10]} in all or "
                f"in none with `n_models={self.n_models}`. Train more models."
            )
        report(self, setting, found)
        return found.values[0]

    def unit(self, setting: Setting) -> str:
        """That of the query's loss or measurement; the Data Banzhaf value is named."""
        name = ", Data Banzhaf value" if self.sampling == "bernoulli" and self.fraction == 0.5 else ""
        return f"query loss (or measurement){name}"

    def models(self, setting: Setting) -> tuple[Tensor, list[int]]:
        """One model for each random subset that is not empty."""
        n_train = setting.n_train
        if self.sampling == "fixed":
            size = min(n_train - 1, max(1, round(self.fraction * n_train)))
            membership = fixed_size(n_train, self.n_models, size, self.seed)
        else:
            membership = bernoulli(n_train, self.n_models, self.fraction, self.seed)
            membership = membership[membership.any(1)]
        return membership, list(range(len(membership)))

    def _trained(self, setting: Setting, queries: Queries) -> tuple[Tensor, Tensor]:
        """Memberships, [model, train], and losses, [model, query], of the models that could be trained."""
        if self.sampling == "fixed":
            setting.note(
                "All subsets have the same size, so a score compares an example with the average other, and scores sum "
                "to about zero."
            )
        membership, seeds = self.models(setting)
        losses = losses_of(setting, queries, membership, seeds)
        trained = ~losses.isnan().all(1)
        return membership[trained], losses[trained]


def with_and_without(membership: Tensor, losses: Tensor, own: bool = False) -> Estimate:
    """Mean losses without the example minus with it, and standard errors of the differences.

    Args:
        membership: which training examples each model was trained on, [model, train].
        losses: [model, query].
        own: compute only self-influence, [1, train]; the queries are the training examples.
    """
    shift = losses.mean(0, keepdim=True)  # so that squares lose fewer digits
    centred, inside = losses - shift, membership.to(losses.dtype)
    sides = []
    for mask in (inside, 1 - inside):
        count = mask.sum(0)
        if own:
            total, square = (mask * centred).sum(0)[None], (mask * centred.square()).sum(0)[None]
        else:
            total, square = centred.T @ mask, centred.square().T @ mask
        mean = total / count  # 0 / 0 is NaN, for examples in all subsets or in none
        variance = (square - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=0)
        sides.append((mean, variance / count, count.long()))
    (with_it, with_error, n_in), (without, without_error, n_out) = sides
    return Estimate(without - with_it, (with_error + without_error).sqrt(), n_in, n_out, len(membership))
