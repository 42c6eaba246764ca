"""One call that compares scores with retrained models, a random baseline and the noise ceiling."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.metrics.leave_one_out import LeaveOneOutCorrelation
from lightning_influence.metrics.linear_datamodeling import LinearDatamodelingScore
from lightning_influence.metrics.mislabel import MislabelDetection
from lightning_influence.metrics.paired_metric import PairedMetric
from lightning_influence.metrics.subset_removal import SubsetRemoval
from lightning_influence.numerics.statistics import nanmean, spearman
from lightning_influence.refit import Bank, Refit
from lightning_influence.scores import Scores


@dataclass(frozen=True)
class Evaluation:
    """Metrics of scores beside those of baselines; ``print`` shows them as a table.

    Args:
        metrics: values by name, and the ends of their 95 % intervals as ``name_low`` and ``name_high``.
        baselines: the same metrics for what needs no scores: ``random``, and ``plain loss`` for wrong labels.
        ceiling: the highest rank correlation that any estimate can be expected to reach, since the truth itself is an
            average over a few seeds; 1 where seeds make no difference; NaN where there is only one seed.
        notes: what a reader of the metrics must know.
    """

    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]]
    ceiling: float
    notes: tuple[str, ...] = field(default=())

    @property
    def figures(self) -> dict[str, float]:
        """The earlier name of ``metrics``."""
        return self.metrics

    @property
    def beats_random(self) -> bool:
        """Whether the whole interval of the main metric is above the random baseline's value."""
        name = "lds" if "lds" in self.metrics else "spearman"
        return self.metrics[f"{name}_low"] > self.baselines["random"][name]

    def __repr__(self) -> str:
        lines = [f"{'':20}" + "".join(f"{name:>22}" for name in ("scores", *self.baselines))]
        for name in (name for name in self.metrics if not name.endswith(("_low", "_high"))):
            cells = [_cell(name, column) for column in (self.metrics, *self.baselines.values())]
            lines.append(f"{name:20}" + "".join(f"{cell:>22}" for cell in cells))
        lines.append(f"noise ceiling of rank correlations: {self.ceiling:.2f}")
        return "\n".join([*lines, *self.notes])


def evaluate(
    scores: Scores, bank: Bank, mislabelled: Tensor | None = None, suspicion: Tensor | None = None, seed: int = 0
) -> Evaluation:
    """Evaluate scores against retrained models.

    Args:
        scores: [query, train], of the queries that the bank measured.
        bank: from ``Refit.bank``: random subsets give the linear datamodeling score, ``leave_out=`` the leave-one-out
            correlation.
        mislabelled: [train], nonzero for wrong labels; adds metrics of how well they are detected.
        suspicion: [train], ranks the labels, such as self-influence. None: the mean negative score over queries.
        seed: of the random baseline and of the bootstrap intervals.

    Returns:
        Metrics with intervals, baselines, and the noise ceiling.

    Raises:
        ValueError: the scores are of other queries or training examples than the bank.

    Example:
        >>> from lightning_influence.metrics import evaluate
        >>> evaluate(scores, refit.bank(test_dataset, n_seeds=2))  # doctest: +SKIP
    """
    values = scores.values.double()
    bank = bank.whole()
    _check_same(scores, bank)
    if bank.left_out is not None:  # columns by the id of the example that is left out
        whole = torch.full((len(values), bank.membership.shape[1]), torch.nan, dtype=values.dtype)
        whole[:, scores.train_ids] = values
        values = whole
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(values.shape, generator=draw, dtype=torch.float64)
    metrics, random = _agreement(values, bank, seed), _agreement(noise, bank, seed)
    baselines = {"random": random}
    if mislabelled is not None:
        own = -scores.values.double().nanmean(0) if suspicion is None else suspicion
        metrics |= _wrong_labels(own, mislabelled, seed)
        random |= _wrong_labels(torch.rand(len(mislabelled), generator=draw), mislabelled, seed)
        if bank.train_losses is not None:
            baselines["plain loss"] = _wrong_labels(bank.train_losses, mislabelled, seed)
    notes = list(bank.notes)
    ceiling = _ceiling(bank, notes)
    return Evaluation(metrics, baselines, ceiling, tuple(notes))


def subset_removal(scores: Scores, refit: Refit, k: int, queries: Any = None, n_seeds: int = 1) -> SubsetRemoval:
    """Leave out each query's k strongest proponents, retrain, and measure how much worse the query becomes.

    Args:
        scores: of queries and training examples.
        refit: how models are retrained; the one passed to the ``Attributor``.
        k: how many proponents are left out.
        queries: the queries' dataset; None: those that the attributor last scored.
        n_seeds: models averaged per query, for independent seeds.

    Returns:
        The metric, updated: call ``compute`` or ``plot``.

    Raises:
        ValueError: no queries, or another number of queries than the scores have.
    """
    bank = refit.without(scores.proponents(k).train_ids, queries, n_seeds)
    if len(bank.query_ids) != len(scores):
        raise ValueError(f"Expected the scores' {len(scores)} queries, got {len(bank.query_ids)}. Pass their dataset.")
    metric = SubsetRemoval()
    metric.update(bank.full.T, torch.stack([bank.losses[q, :, q] for q in range(len(bank))]))
    return metric


def _agreement(values: Tensor, bank: Bank, seed: int) -> dict[str, float]:
    if bank.left_out is not None:
        return _numbers(LeaveOneOutCorrelation(seed=seed), values, bank.changes, bank.left_out)
    return _numbers(LinearDatamodelingScore(seed=seed), values, bank.membership, bank.mean)


def _wrong_labels(suspicion: Tensor, mislabelled: Tensor, seed: int) -> dict[str, float]:
    return _numbers(MislabelDetection(seed=seed), suspicion, mislabelled)


def _numbers(metric: PairedMetric, *data: Any) -> dict[str, float]:
    metric.update(*data)
    return {name: float(value) for name, value in metric.compute().items()}


def _ceiling(bank: Bank, notes: list[str]) -> float:
    """The rank correlation that the mean over all seeds would have with the mean over these."""
    if bank.deterministic:
        return 1.0
    halves = bank.halves()
    if halves is None:
        notes.append("One model per subset: the noise of the truth is unknown. Pass `Refit.bank(n_seeds=2)`.")
        return float("nan")
    if bank.left_out is not None:
        halves = tuple(half - bank.full.nanmean(0) for half in halves)  # type: ignore[assignment]
    agreement = float(nanmean(spearman(halves[0].T, halves[1].T)))
    whole = 2 * agreement / (1 + agreement)  # twice as many seeds (Spearman and Brown)
    return whole**0.5 if whole > 0 else 0.0


def _check_same(scores: Scores, bank: Bank) -> None:
    queries, n_train = len(bank.query_ids), bank.membership.shape[1]
    needed = torch.arange(n_train) if bank.left_out is None else bank.left_out
    missing = needed[~torch.isin(needed, scores.train_ids)].tolist()
    beyond = int(scores.train_ids.max()) >= n_train
    if len(scores) != queries or missing or beyond:
        raise ValueError(
            f"Expected scores of the bank's {queries} queries and {n_train} training examples, got {len(scores)} "
            "queries"
            f"{f' and no scores of the training examples {missing[:5]}' if missing else ''}"
            f"{f' and training ids up to {int(scores.train_ids.max())}' if beyond else ''}."
        )


def _cell(name: str, column: dict[str, float]) -> str:
    if name not in column:
        return ""
    value = f"{column[name]:.3f}"
    if f"{name}_low" not in column:
        return value
    return f"{value} [{column[f'{name}_low']:.2f}, {column[f'{name}_high']:.2f}]"
