"""One call that compares scores with retrained models, a random baseline and the noise ceiling."""

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from lightning_influence.hints import hinted
from lightning_influence.metrics.comparison import Comparison, Evaluation, compare
from lightning_influence.metrics.leave_one_out import LeaveOneOutCorrelation
from lightning_influence.metrics.linear_datamodeling import LinearDatamodelingScore
from lightning_influence.metrics.mislabel import MislabelDetection
from lightning_influence.metrics.paired_metric import PairedMetric
from lightning_influence.metrics.subset_removal import SubsetRemoval
from lightning_influence.numerics.statistics import nanmean, spearman
from lightning_influence.refit import Bank, Refit
from lightning_influence.scores import Scores, SelfScores


@overload
def evaluate(
    scores: Scores, bank: Bank, mislabelled: Tensor | None = None, suspicion: Tensor | None = None, seed: int = 0
) -> Evaluation: ...


@overload
def evaluate(
    scores: Mapping[str, Scores],
    bank: Bank,
    mislabelled: Tensor | None = None,
    suspicion: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Comparison: ...


@hinted
def evaluate(
    scores: Scores | Mapping[str, Scores],
    bank: Bank,
    mislabelled: Tensor | None = None,
    suspicion: Any = None,
    seed: int = 0,
) -> Any:
    """Evaluate scores against retrained models, or compare those of several methods.

    Args:
        scores: [query, train], of the queries that the bank measured; or a dict of names and such scores.
        bank: from ``Refit.bank``: random subsets give the linear datamodeling score, ``leave_out=`` the leave-one-out
            correlation.
        mislabelled: [train], nonzero for wrong labels; adds metrics of how well they are detected.
        suspicion: [train], ranks the labels, such as self-influence. None: the mean negative score over queries. Of
            several methods: a dict of the same names; those without an entry take the mean over queries.
        seed: of the random baseline and of the bootstrap intervals.

    Returns:
        Metrics with intervals, baselines, and the noise ceiling; of several methods a ``Comparison``, which says by how
        much each is behind the best, and whether the bank can tell the two apart.

    Raises:
        TypeError: something else than ``Scores``, or names that are no strings.
        ValueError: the scores are of other queries or training examples than the bank, or the methods' of different
            queries; an empty dict.

    Example:
        >>> from lightning_influence.metrics import evaluate
        >>> bank = refit.bank(test_dataset, n_seeds=2)  # doctest: +SKIP
        >>> evaluate(scores, bank)  # doctest: +SKIP
        >>> evaluate({"EK-FAC": scores, "SOURCE": others}, bank)  # doctest: +SKIP
    """
    named, suspicions = _by_name(scores, suspicion)
    bank = bank.whole()
    for name, one in named.items():
        _check_same(name, one, bank)
    _check_queries(named)
    notes = list(bank.notes)
    ceiling, baselines = _ceiling(bank, notes), _baselines(bank, mislabelled, seed)
    found, predicted, observed = {}, {}, bank.losses
    for name, one in named.items():
        metric, values = _metric(bank, seed), one.values.double()
        metrics = _numbers(metric, *_pairs(values, one.train_ids, bank))
        if mislabelled is not None:
            own = suspicions.get(name)
            metrics |= _wrong_labels(-values.nanmean(0) if own is None else own, mislabelled, seed)
        found[name] = Evaluation(metrics, baselines, ceiling, tuple(notes))
        (predicted[name],), (observed,) = metric.predicted, metric.observed
    return compare(found, predicted, observed, seed) if isinstance(scores, Mapping) else found[""]


@hinted
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


def _by_name(scores: Scores | Mapping[str, Scores], suspicion: Any) -> tuple[dict[str, Scores], dict[str, Tensor]]:
    """The scores and suspicions by name; a single one has the name ``""``.

    Raises:
        TypeError: other types.
        ValueError: there are none, or suspicions of names without scores.
    """
    several = isinstance(scores, Mapping)
    named = dict(scores) if isinstance(scores, Mapping) else {"": scores}
    if not named:
        raise ValueError("Expected `scores` to be of at least one method, got an empty dict.")
    for name, one in named.items():
        if not isinstance(name, str):
            raise TypeError(f"Expected the names of `scores` to be strings, got {name!r}.")
        if not isinstance(one, Scores):
            other = " Pass self-influence as `suspicion`." if isinstance(one, SelfScores) else ""
            raise TypeError(
                f"Expected {_called(name)} to be `Scores`, [query, train], got {type(one).__name__}.{other}"
                f"{'' if several else ' For several methods, pass a dict of names and scores.'}"
            )
    if suspicion is None or not several:
        return named, {} if suspicion is None else {"": suspicion}
    if not isinstance(suspicion, Mapping):
        raise TypeError(
            f"Expected `suspicion` of several methods to be a dict of their names, got {type(suspicion).__name__}."
        )
    unknown = [name for name in suspicion if name not in named]
    if unknown:
        raise ValueError(f"Expected the names in `suspicion` to be among {list(named)!r}, got {unknown!r}.")
    return named, dict(suspicion)


def _called(name: str) -> str:
    return f"`scores[{name!r}]`" if name else "`scores`"


def _baselines(bank: Bank, mislabelled: Tensor | None, seed: int) -> dict[str, dict[str, float]]:
    """The metrics of what needs no scores."""
    draw = torch.Generator().manual_seed(seed)
    shape = (len(bank.query_ids), bank.membership.shape[1])
    noise = torch.randn(shape, generator=draw, dtype=torch.float64)
    random = _numbers(_metric(bank, seed), *_pairs(noise, torch.arange(shape[1]), bank))
    baselines = {"random": random}
    if mislabelled is not None:
        random |= _wrong_labels(torch.rand(len(mislabelled), generator=draw), mislabelled, seed)
        if bank.train_losses is not None:
            baselines["plain loss"] = _wrong_labels(bank.train_losses, mislabelled, seed)
    return baselines


def _metric(bank: Bank, seed: int) -> PairedMetric:
    return LinearDatamodelingScore(seed=seed) if bank.left_out is None else LeaveOneOutCorrelation(seed=seed)


def _pairs(values: Tensor, train_ids: Tensor, bank: Bank) -> tuple[Tensor, Tensor, Tensor]:
    """What the bank's metric is updated with."""
    if bank.left_out is None:
        return values, bank.membership, bank.mean
    whole = torch.full((len(values), bank.membership.shape[1]), torch.nan, dtype=values.dtype)
    whole[:, train_ids] = values  # columns by the id of the example that is left out
    return whole, bank.changes, bank.left_out


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


def _check_same(name: str, scores: Scores, bank: Bank) -> None:
    queries, n_train = len(bank.query_ids), bank.membership.shape[1]
    needed = torch.arange(n_train) if bank.left_out is None else bank.left_out
    missing = needed[~torch.isin(needed, scores.train_ids)].tolist()
    beyond = int(scores.train_ids.max()) >= n_train
    if len(scores) != queries or missing or beyond:
        raise ValueError(
            f"Expected {f'{_called(name)} to be of' if name else 'scores of'} the bank's {queries} queries and "
            f"{n_train} training examples, got {len(scores)} queries"
            f"{f' and no scores of the training examples {missing[:5]}' if missing else ''}"
            f"{f' and training ids up to {int(scores.train_ids.max())}' if beyond else ''}."
        )


def _check_queries(named: dict[str, Scores]) -> None:
    """Raises ValueError for methods that scored different queries."""
    (first, one), *others = named.items()
    for name, other in others:
        differ = other.query_ids != one.query_ids
        if bool(differ.any()):
            at = int(differ.int().argmax())
            raise ValueError(
                f"Expected all methods to have scored the same queries, got query {int(one.query_ids[at])} of "
                f"{first!r} where {name!r} has query {int(other.query_ids[at])}. Score the bank's queries with each."
            )
