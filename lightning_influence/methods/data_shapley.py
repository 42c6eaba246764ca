"""DataShapley: an example's mean contribution over orders of the training data (Ghorbani and Zou, 2019)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.checks import check_at_least_0, check_integer
from lightning_influence.methods.retraining import Estimate, Retraining, losses_of, models_of
from lightning_influence.numerics.subsets import every, prefixes
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.wording import counted

# Models trained at once before an order may be cut short, and how many values in a row must be within the tolerance.
_TOGETHER, _IN_A_ROW = 16, 5
# Orders before the first test of convergence.
_WARM_UP = 10


@dataclass(frozen=True)
class DataShapley(Retraining):
    r"""How much an example adds to the value of the examples before it, as a mean over all orders of the data.

    .. math:: s(q, z_i) = \sum_{S \not\ni i} \frac{|S|! \, (n-|S|-1)!}{n!} \, [v_q(S \cup i) - v_q(S)]

    with v the value of a subset for a query: minus the query's loss under a model trained on the subset. Exact if the
    budget allows all 2^n subsets; otherwise truncated Monte Carlo over random orders. The scores of a query sum to
    v(all) - v(none), up to ``tolerance`` if orders are cut short.

    Source: Ghorbani, Zou. Data Shapley: Equitable Valuation of Data for Machine Learning. ICML 2019.
    Needs: ``Attributor(refit=)``.
    Units: query loss (or measurement).
    Cost: up to ``budget`` training runs, once; more queries take forward passes only (and more models, if they cut an
    order later).
    Departs from the paper: the tolerance is absolute, in units of the value; the value of the empty set is a
    hyper-parameter; the first example of an order gets its contribution too.

    Args:
        budget: the most models to train. An order takes n models, or fewer if it is cut short.
        tolerance: an order is cut short, for a query, once the value was this close to v(all) more than five times in
            a row. 0: never.
        convergence: stop before the budget is used up, once the median standard error is below this fraction of the
            scores' standard deviation (after at least ten orders). None: never.
        empty: the loss (or measurement) without any training example: a number, or ``"initial"`` for that of the
            untrained model.
        seed: of the random orders; all models of the k-th order are trained with seed k.

    Raises:
        ValueError: other values; a budget that is too small for one order.
    """

    budget: int = 1000
    tolerance: float = 0.0
    convergence: float | None = None
    empty: float | Literal["initial"] = "initial"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("budget", self.budget)
        check_at_least_0("tolerance", self.tolerance)
        if isinstance(self.empty, str) and self.empty != "initial":
            raise ValueError(f"Expected `empty` to be a number or 'initial', got {self.empty!r}.")

    def estimate(self, setting: Setting, queries: Queries) -> Estimate:
        """Scores, with standard errors over orders; none if they are exact.

        Raises:
            ValueError: a budget that is too small for one order.
            RuntimeError: a model that could not be trained, if all subsets are needed.
        """
        if self._all_subsets(setting.n_train):
            return self._exact(setting, queries)
        if self.budget < setting.n_train:
            raise ValueError(
                f"Expected `budget` to allow one order of the {setting.n_train} training examples, got "
                f"{self.budget!r}. Raise it, use fewer examples (`torch.utils.data.Subset`), or use `Downsampling`."
            )
        return self._monte_carlo(setting, queries)

    def models(self, setting: Setting) -> tuple[Tensor, list[int]]:
        """All subsets, or those of as many orders as the budget allows; orders that are cut short need fewer."""
        n = setting.n_train
        if self._all_subsets(n):
            return every(n)[1:], [0] * (2**n - 1)
        orders = range(self.budget // n)
        membership = [prefixes(self._order(n, order)) for order in orders]
        seeds = [order for order in orders for _ in range(n)]
        return (torch.cat([rows[1:] for rows in membership]), seeds) if membership else super().models(setting)

    def _all_subsets(self, n_train: int) -> bool:
        return n_train < 63 and 2**n_train - 1 <= self.budget

    def _order(self, n_train: int, number: int) -> Tensor:
        """A random order of the training examples."""
        return torch.randperm(n_train, generator=torch.Generator().manual_seed(self.seed * 2**32 + number))

    def _exact(self, setting: Setting, queries: Queries) -> Estimate:
        n = setting.n_train
        membership = every(n)
        values = -losses_of(setting, queries, membership[1:], [0] * (len(membership) - 1))
        values = torch.cat([-self._empty_loss(setting, queries, 0), values])
        if bool(values.isnan().any()):
            raise RuntimeError(
                "Expected a model for each of the subsets, got failures. The warnings above have the reasons."
            )
        sizes = membership.sum(1)
        weight = torch.tensor([1 / (n * math.comb(n - 1, s)) for s in range(n)], dtype=values.dtype)
        inside, outside = weight[(sizes - 1).clamp(min=0)], weight[sizes.clamp(max=n - 1)]
        credit = torch.where(membership, inside[:, None], -outside[:, None])
        half = torch.full((n,), len(membership) // 2)
        setting.note(f"Exact: all {counted(len(membership), 'subset')}.")
        return Estimate(values.T @ credit, None, half, half, len(membership) - 1)

    def _monte_carlo(self, setting: Setting, queries: Queries) -> Estimate:
        n = setting.n_train
        total, square = (torch.zeros(len(queries), n, dtype=torch.float64) for _ in range(2))
        count, used, orders = torch.zeros(len(queries), n, dtype=torch.int64), 0, 0
        while used + n <= self.budget:
            order = self._order(n, orders)
            values, trained = self._walk(setting, queries, order, orders)
            marginal = torch.empty_like(total)
            marginal[:, order] = values.diff(dim=0).T
            known = ~marginal.isnan()
            total += marginal.nan_to_num(0.0)
            square += marginal.nan_to_num(0.0).square()
            count += known
            used, orders = used + trained, orders + 1
            if self._converged(total, square, count, orders):
                break
        mean = total / count
        errors = _standard_error(total, square, count)
        setting.note(
            f"Truncated Monte Carlo: {counted(orders, 'order')}, {counted(used, 'model')} of a budget of {self.budget}."
        )
        if self.convergence is not None and not self._converged(total, square, count, orders):
            setting.note(
                f"Not converged: the median standard error is above {self.convergence:g} of the scores' standard "
                "deviation. Raise `budget`."
            )
        full = torch.full((n,), orders)
        return Estimate(mean, errors, full, full, used)

    def _walk(self, setting: Setting, queries: Queries, order: Tensor, seed: int) -> tuple[Tensor, int]:
        """Values of the first 0, 1, ... n examples of an order, [n + 1, query], and how many models they took."""
        membership = prefixes(order)
        n = len(order)
        whole = -losses_of(setting, queries, membership[n:], [seed])[0]
        values = whole.expand(n + 1, -1).clone()  # examples after the cut contribute 0
        values[0] = -self._empty_loss(setting, queries, seed)[0]
        close = torch.zeros(len(whole), dtype=torch.int64)
        step = n if self.tolerance == 0 else _TOGETHER
        for start in range(1, n, step):
            rows = range(start, min(start + step, n))
            found = -losses_of(setting, queries, membership[rows], [seed] * len(rows))
            for row, value in zip(rows, found, strict=True):
                done = close > _IN_A_ROW
                values[row] = torch.where(done, values[row - 1], value)
                near = (value - whole).abs() <= self.tolerance if self.tolerance > 0 else done
                close = torch.where(near | done, close + 1, 0)
            if bool((close > _IN_A_ROW).all()):
                values[rows.stop : n + 1] = values[rows.stop - 1]
                return values, rows.stop
        values[n] = torch.where(close > _IN_A_ROW, values[n - 1], whole)
        return values, n

    def _empty_loss(self, setting: Setting, queries: Queries, seed: int) -> Tensor:
        """The loss without any training example, [1, query]."""
        if self.empty == "initial":
            return models_of(setting).untrained([seed], queries)
        return torch.full((1, len(queries)), float(self.empty), dtype=torch.float64)

    def _converged(self, total: Tensor, square: Tensor, count: Tensor, orders: int) -> bool:
        if self.convergence is None or orders < _WARM_UP:
            return False
        errors, spread = _standard_error(total, square, count), (total / count).std(1)
        return bool((errors.nanmedian(1).values <= self.convergence * spread).all())


def _standard_error(total: Tensor, square: Tensor, count: Tensor) -> Tensor:
    variance = (square - total.square() / count).clamp(min=0) / (count - 1).clamp(min=0)
    return (variance / count).sqrt()
