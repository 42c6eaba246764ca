"""The metrics: identities, scipy's values, torchmetrics' own conventions, and their errors."""

import pickle
import sys

import pytest
import scipy.stats
import torch
from oracles_retraining import correlation_over_subsets
from sklearn.metrics import roc_auc_score

from lightning_influence.metrics import (
    LeaveOneOutCorrelation,
    LinearDatamodelingScore,
    MislabelDetection,
    SubsetRemoval,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subsets(n=25, train=12, size=6, seed=3):
    order = torch.rand(n, train, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order < size


def lds(scores, membership, losses, **options):
    metric = LinearDatamodelingScore(**options)
    metric.update(scores, membership, losses)
    return metric.compute()


# ---- linear datamodeling ---------------------------------------------------------------------------------------------


def test_lds_of_an_additive_model_is_one_and_of_its_negation_minus_one():
    scores, membership = drawn(5, 12), subsets()
    losses = 3.0 - membership.double() @ scores.T
    assert float(lds(scores, membership, losses)["lds"]) == pytest.approx(1.0, abs=1e-12)
    assert float(lds(-scores, membership, losses)["lds"]) == pytest.approx(-1.0, abs=1e-12)


def test_lds_is_scipys():
    scores, membership, losses = drawn(5, 12), subsets(), drawn(25, 5, seed=1)
    expected = correlation_over_subsets(scores, membership, losses)
    found = lds(scores, membership, losses)
    assert float(found["lds"]) == pytest.approx(expected, abs=1e-12)
    assert found["lds_low"] < found["lds"] < found["lds_high"]
    assert "lds_low" not in lds(scores, membership, losses, n_bootstrap=0)


@pytest.mark.parametrize("constant", [0.1, 1e-8, -12345.678])
def test_constant_scores_are_nan_not_zero(constant):
    found = lds(torch.full((3, 12), constant), subsets(), drawn(25, 3))
    assert found["lds"].isnan()
    assert found["lds_low"].isnan()
    assert float(found["undefined"]) == 3


def test_queries_without_a_correlation_do_not_count():
    scores, membership, losses = drawn(4, 12), subsets(), drawn(25, 4, seed=1)
    scores[1, 3] = torch.nan
    losses[:, 2] = 0.5
    found = lds(scores, membership, losses)
    kept = [0, 3]
    expected = correlation_over_subsets(scores[kept], membership, losses[:, kept])
    assert float(found["lds"]) == pytest.approx(expected, abs=1e-12)
    assert float(found["undefined"]) == 2


def test_lds_interval_covers_the_truth_about_as_often_as_it_says():
    weights = drawn(1, 12)
    inside = 0
    for seed in range(40):
        membership = subsets(60, seed=seed)
        noise = 1.5 * drawn(60, 30, seed=100 + seed)
        scores = weights.expand(30, 12)
        losses = -(membership.double() @ scores.T) + noise
        found = lds(scores, membership, losses, n_bootstrap=100)
        inside += bool(found["lds_low"] <= TRUE_LDS <= found["lds_high"])
    assert inside >= 34


TRUE_LDS = 0.759  # of the weights and the noise above, over 20,000 subsets: see the next test


def test_the_true_score_of_the_test_above():
    membership = subsets(20_000, seed=9)
    predicted = membership.double() @ drawn(1, 12)[0]
    noisy = predicted + 1.5 * drawn(20_000, seed=8)
    assert scipy.stats.spearmanr(predicted, noisy)[0] == pytest.approx(TRUE_LDS, abs=0.01)


# ---- leave-one-out ---------------------------------------------------------------------------------------------------


def test_leave_one_out_is_scipys_and_aligned_by_id():
    scores, changes, ids = drawn(4, 12), drawn(4, 5, seed=1), [7, 0, 3, 11, 2]
    metric = LeaveOneOutCorrelation()
    metric.update(scores, changes, ids)
    found = metric.compute()
    for name, theirs in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
        expected = sum(theirs(scores[q, ids], changes[q])[0] for q in range(4)) / 4
        assert float(found[name]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.25, -2.0])
def test_slope_sees_a_wrong_scale_that_ranks_do_not(scale):
    metric = LeaveOneOutCorrelation(n_bootstrap=20)
    changes = drawn(4, 9)
    metric.update(scale * changes + drawn(4, 1, seed=1), changes)
    found = metric.compute()
    assert float(found["slope"]) == pytest.approx(scale, abs=1e-12)
    assert float(found["spearman"]) == pytest.approx(1.0 if scale > 0 else -1.0, abs=1e-12)


# ---- wrong labels, removal -------------------------------------------------------------------------------------------


def test_mislabel_detection_is_scikit_learns():
    suspicion, wrong = drawn(80).round(decimals=1), drawn(80, seed=1) > 1
    metric = MislabelDetection(fractions=(0.1, 1.0))
    metric.update(suspicion, wrong)
    found = metric.compute()
    assert float(found["auroc"]) == pytest.approx(roc_auc_score(wrong, suspicion), abs=1e-12)
    assert float(found["recall_at_1"]) == 1.0
    assert float(found["precision_at_1"]) == pytest.approx(float(wrong.double().mean()))
    assert float(found["precision_at_0.1"]) == pytest.approx(float(found["recall_at_0.1"] * wrong.sum() / 8))
    assert found["auroc_low"] < found["auroc"] < found["auroc_high"]
    constant = MislabelDetection()
    constant.update(torch.zeros(80), wrong)
    assert {
        f"{name}_at_{at}" for name in ("precision", "recall") for at in ("0.01", "0.05", "0.1")
    } <= constant.compute().keys()
    assert {round(float(v), 9) for k, v in constant.compute().items() if k in ("auroc", "auroc_low")} == {0.5}


def test_subset_removal_averages_seeds():
    metric = SubsetRemoval()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 5.0], [1.0, 2.0]]))
    found = metric.compute()
    assert float(found["increase"]) == pytest.approx((3.0 - 0.5) / 2)
    assert float(found["share_worse"]) == 0.5


# ---- what every torchmetrics.Metric does -----------------------------------------------------------------------------

FED = {
    LinearDatamodelingScore: [(drawn(2, 12, seed=s), subsets(), drawn(25, 2, seed=s + 9)) for s in range(3)],
    LeaveOneOutCorrelation: [(drawn(2, 12, seed=s), drawn(2, 12, seed=s + 9)) for s in range(3)],
    MislabelDetection: [(drawn(30, seed=s), drawn(30, seed=s + 9) > 0.5) for s in range(3)],
    SubsetRemoval: [(drawn(4, seed=s), drawn(4, 3, seed=s + 9)) for s in range(3)],
}


@pytest.mark.parametrize("kind", FED, ids=lambda kind: kind.__name__)
def test_torchmetrics_conventions(kind):
    whole, parts = kind(n_bootstrap=20), [kind(n_bootstrap=20) for _ in range(3)]
    for part, fed in zip(parts, FED[kind], strict=True):
        alone = kind(n_bootstrap=20)
        alone.update(*fed)
        same(part(*fed), alone.compute())  # forward gives the value of the batch and gathers it
        whole.update(*fed)
    expected = whole.compute()
    merged = parts[0]
    for other in parts[1:]:
        # States of a later process follow those of an earlier one, as a reduction over processes has them.
        other.merge_state(merged)
        merged = other
    same(merged.compute(), expected)
    same(pickle.loads(pickle.dumps(merged)).compute(), expected)
    merged.reset()
    same(merged(*FED[kind][0]), alone_of(kind))
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in expected.values())


def judge(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for kind, fed in FED.items():
        metric = kind(n_bootstrap=20)
        for one in fed[:2] if rank == 0 else fed[2:]:  # unequal shares
            metric.update(*one)
        found[kind.__name__] = metric.compute()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_reduction_over_two_real_processes(tmp_path):
    torch.multiprocessing.spawn(judge, (str(tmp_path),), nprocs=2)
    for kind, fed in FED.items():
        whole = kind(n_bootstrap=20)
        for one in fed:
            whole.update(*one)
        for rank in (0, 1):
            same(torch.load(tmp_path / f"{rank}.pt")[kind.__name__], whole.compute())


@pytest.mark.parametrize("kind", FED, ids=lambda kind: kind.__name__)
def test_plots(kind, tmp_path):
    metric = kind(n_bootstrap=0)
    metric.update(*FED[kind][0])
    figure, axes = metric.plot()
    figure.savefig(tmp_path / "figure.png")
    assert axes.get_xlabel()
    assert metric.plot(ax=axes)[1] is axes
    values = metric.compute()
    _, axes = metric.plot(values)  # torchmetrics' own way
    assert axes is not None


@pytest.mark.parametrize("kind", FED, ids=lambda kind: kind.__name__)
def test_plots_without_matplotlib_name_the_extra(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lightning-influence\[plot\]"):
        kind().plot()


def alone_of(kind):
    metric = kind(n_bootstrap=20)
    metric.update(*FED[kind][0])
    return metric.compute()


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, equal_nan=True, msg=name)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SubsetRemoval(n_bootstrap=-1), ValueError, "`n_bootstrap` to be an integer of at least 0, got -1"),
        (lambda: SubsetRemoval(n_bootstrap=True), ValueError, "`n_bootstrap` to be an integer of at least 0, got True"),
        (lambda: SubsetRemoval(n_bootstrap=20.0), ValueError, "`n_bootstrap` to be an integer of at least 0, got 20.0"),
        (lambda: MislabelDetection(fractions=(0.1, 1.5)), ValueError, r"got \[1.5\]"),
        (lambda: LinearDatamodelingScore().update([1], subsets(), drawn(25, 1)), TypeError, "pass `.values`"),
        (lambda: LinearDatamodelingScore().update(drawn(12), subsets(), drawn(25, 1)), ValueError, "two dimensions"),
        (lambda: LinearDatamodelingScore().update(drawn(2, 12), subsets(), drawn(2, 25)), ValueError, "that fit"),
        (lambda: LeaveOneOutCorrelation().update(drawn(2, 12), drawn(2, 3)), ValueError, "Pass the `ids`"),
        (lambda: MislabelDetection().update(drawn(3), drawn(4) > 0), ValueError, r"got \[3\] and \[4\]"),
        (lambda: MislabelDetection().update(drawn(3) / 0, drawn(3) > 0), ValueError, "infinity for 3 of 3"),
        (lambda: SubsetRemoval().update(drawn(3), drawn(4)), ValueError, r"got \[3\] and \[4\]"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_calls_with_other_subsets_are_refused():
    metric = LinearDatamodelingScore()
    metric.update(drawn(2, 12), subsets(), drawn(25, 2))
    with pytest.raises(ValueError, match="the 25 subsets of earlier calls, got 24"):
        metric.update(drawn(2, 12), subsets(24), drawn(24, 2))
    other = LeaveOneOutCorrelation()
    other.update(drawn(2, 12), drawn(2, 12))
    with pytest.raises(ValueError, match="the 12 examples of earlier calls, got 11"):
        other.update(drawn(2, 11), drawn(2, 11))
