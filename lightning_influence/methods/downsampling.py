"""Downsampling: how queries fare with and without the example among random halves (Feldman and Zhang, 2020)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_influence.checks import check_fraction, check_integer, one_of
from lightning_influence.methods.retraining import Estimate, Retraining, losses_of, report
from lightning_influence.numerics.subsets import bernoulli, fixed_size
from lightning_influence.setting.setting import Queries, Setting


@dataclass(frozen=True)
class Downsampling(Retraining):
    r"""Mean loss of a query under models without the example, less the mean under models with it.

    .. math:: s(q, z_i) = \operatorname{mean}_{S \not\ni i} \ell(w_S, q) - \operatorname{mean}_{S \ni i} \ell(w_S, q)

    Self-influence is the memorisation of the example: the same with itself as the query. With subsets of one size, the
    scores of a query sum to zero where losses are additive; with ``sampling="bernoulli"`` and ``fraction=0.5`` the
    estimate is the Data Banzhaf value (Wang, Jia. AISTATS 2023).

    Source: Feldman, Zhang. What Neural Networks Memorize and Why. NeurIPS 2020.
    Needs: ``Attributor(refit=)``.
    Units: query loss (or measurement).
    Cost: ``n_models`` training runs, once; another query costs forward passes only.

    Args:
        n_models: subsets, one model each.
        fraction: of the training data in each.
        sampling: ``"fixed"`` size, or ``"bernoulli"``: each example on its own.
        seed: of the subsets; the k-th model is trained under seed k.

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
        """Scores, with standard errors and counts."""
        membership, losses = self._trained(setting, queries)
        self._note(setting)
        return with_and_without(membership, losses)

    def self_influence(self, setting: Setting) -> Tensor:
        """[train]: memorisation."""
        self._note(setting)
        every = Queries(setting.engine, setting.examples, range(setting.n_train))
        found = with_and_without(*self._trained(setting, every), own=True)
        unknown = found.values[0].isnan().nonzero()[:, 0].tolist()
        if unknown:
            raise ValueError(
                f"Expected every example in some subset and out of some, got training examples {unknown[:10]} that are "
                f"not with `n_models={self.n_models}`. Train more."
            )
        report(self, setting, found)
        return found.values[0]

    def unit(self, setting: Setting) -> str:
        """Of the loss or measurement, and which value it is."""
        name = ", Data Banzhaf value" if self.sampling == "bernoulli" and self.fraction == 0.5 else ""
        return f"query loss (or measurement){name}"

    def _trained(self, setting: Setting, queries: Queries) -> tuple[Tensor, Tensor]:
        """Memberships and losses of the models that could be trained."""
        n_train = setting.n_train
        if self.sampling == "fixed":
            size = min(n_train - 1, max(1, round(self.fraction * n_train)))
            membership = fixed_size(n_train, self.n_models, size, self.seed)
        else:
            membership = bernoulli(n_train, self.n_models, self.fraction, self.seed)
            membership = membership[membership.any(1)]
        losses = losses_of(setting, queries, membership, list(range(len(membership))))
        whole = ~losses.isnan().all(1)
        return membership[whole], losses[whole]

    def _note(self, setting: Setting) -> None:
        if self.sampling == "fixed":
            setting.note(
                "Subsets of one size: scores compare an example with those that took its place, and sum to about zero."
            )


def with_and_without(membership: Tensor, losses: Tensor, own: bool = False) -> Estimate:
    """Differences of means, their standard errors, and counts.

    Args:
        membership: [model, train].
        losses: [model, query].
        own: the queries are the training examples, and only the score of each on itself is wanted: [1, train].
    """
    shift = losses.mean(0, keepdim=True)  # small numbers before they are squared
    centred, inside = losses - shift, membership.to(losses.dtype)
    sides = []
    for mask in (inside, 1 - inside):
        count = mask.sum(0)
        if own:
            total, square = (mask * centred).sum(0)[None], (mask * centred.square()).sum(0)[None]
        else:
            total, square = centred.T @ mask, centred.square().T @ mask
        mean = total / count  # 0 / 0 is NaN: never in, or never out
        variance = (square - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=0)
        sides.append((mean, variance / count, count.long()))
    (with_it, with_error, n_in), (without, without_error, n_out) = sides
    return Estimate(without - with_it, (with_error + without_error).sqrt(), n_in, n_out, len(membership))
