"""Rank statistics against scipy and scikit-learn, with and without ties; what is undefined is NaN."""

import pytest
import scipy.stats
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from lightning_influence.numerics import statistics


def drawn(*shape, ties, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * 2).round() if ties else values


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys(ties):
    left, right = drawn(5, 30, ties=ties), drawn(5, 30, ties=ties, seed=1)
    for ours, theirs in ((statistics.spearman, scipy.stats.spearmanr), (statistics.pearson, scipy.stats.pearsonr)):
        expected = torch.tensor([theirs(a, b)[0] for a, b in zip(left, right, strict=True)])
        torch.testing.assert_close(ours(left, right), expected, rtol=0, atol=1e-12)


def test_ranks_are_scipys():
    values = drawn(4, 20, ties=True)
    expected = torch.stack([torch.tensor(scipy.stats.rankdata(row)) for row in values])
    torch.testing.assert_close(statistics.ranks(values), expected, rtol=0, atol=0)


def test_slope_is_scipys_of_one_row_and_of_centred_rows():
    said, came = drawn(3, 15, ties=False), drawn(3, 15, ties=False, seed=1)
    one = scipy.stats.linregress(came[0], said[0]).slope
    assert float(statistics.slope(said[:1], came[:1])) == pytest.approx(one, abs=1e-12)
    flat = [(rows - rows.mean(1, keepdim=True)).flatten() for rows in (came, said)]
    assert float(statistics.slope(said, came)) == pytest.approx(scipy.stats.linregress(*flat).slope, abs=1e-12)
    holed = torch.cat([said, torch.full((1, 15), torch.nan, dtype=torch.float64)])
    without = float(statistics.slope(said, came))
    assert float(statistics.slope(holed, torch.cat([came, came[:1]]))) == pytest.approx(without, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_detection_is_scikit_learns(ties):
    scores, positive = drawn(60, ties=ties), drawn(60, ties=False, seed=1) > 0.8
    assert float(statistics.auroc(scores, positive)) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    expected = average_precision_score(positive, scores)
    assert float(statistics.average_precision(scores, positive)) == pytest.approx(expected, abs=1e-12)


def test_recall_counts_ties_in_expectation():
    scores = torch.tensor([3.0, 2.0, 2.0, 2.0, 2.0, 1.0])
    positive = torch.tensor([1, 1, 0, 0, 0, 1]).bool()
    found = [float(statistics.recall_at(scores, positive, k / 6)) * 3 for k in range(1, 7)]
    assert found == pytest.approx([1, 1.25, 1.5, 1.75, 2, 3], abs=1e-12)


@pytest.mark.parametrize("values", [[2.0, 2, 2, 2], [0.1] * 4, [1, torch.nan, 2, 3]])
def test_what_is_undefined_is_nan(values):
    values, other = torch.tensor(values), torch.tensor([1.0, 3, 2, 5])
    for statistic in (statistics.pearson, statistics.spearman):
        assert statistic(values, other).isnan()
        assert statistic(other, values).isnan()
    none = torch.zeros(4).bool()
    assert statistics.auroc(other, none).isnan()
    assert statistics.auroc(other, ~none).isnan()
    assert statistics.average_precision(other, none).isnan()


def test_bootstrap_of_a_mean_is_that_of_theory():
    values = drawn(400, ties=False)
    low, high = statistics.bootstrap(lambda x: x.mean(-1), (values,), 2000, 0, rows=False)
    half = 1.96 * values.std() / 20
    assert float(low) == pytest.approx(float(values.mean() - half), abs=0.1 * float(half))
    assert float(high) == pytest.approx(float(values.mean() + half), abs=0.1 * float(half))


def test_bootstrap_resamples_rows_where_asked():
    values = torch.tensor([[0.0], [1.0]]).expand(2, 50)  # columns carry no noise at all
    ends = [statistics.bootstrap(lambda x: x.mean((-1, -2)), (values,), 200, 0, rows=rows) for rows in (False, True)]
    assert [tuple(map(float, pair)) for pair in ends] == [(0.5, 0.5), (0.0, 1.0)]


def test_bootstrap_keeps_pairs_together():
    values = drawn(3, 20, ties=False)
    low, high = statistics.bootstrap(
        lambda a, b: statistics.pearson(a, b).mean(-1), (values, 2 * values), 50, 0, rows=True
    )
    assert float(low) == pytest.approx(1, abs=1e-12) == float(high)


def test_bootstrap_of_what_is_undefined_is_nan():
    low, high = statistics.bootstrap(lambda x: x.mean(-1), (torch.full((9,), torch.nan),), 20, 0, rows=False)
    assert low.isnan()
    assert high.isnan()
