"""`evaluate` and `subset_removal` on ridge regressions whose truth is known."""

import pytest
import torch
from oracles_retraining import correlation_over_subsets, leave_one_out, ridge_losses
from refit.ridge import DECAY, ClosedRefit, attributor, data
from sklearn.metrics import roc_auc_score

from lightning_influence import LeaveOneOut, MissingEvidence, Refit, Scores
from lightning_influence.metrics import evaluate, subset_removal

TRAIN, TEST = data(20), data(6, seed=1)


def asked(folder, **options):
    refit = ClosedRefit(folder, TRAIN, **options)
    return attributor(TRAIN, refit), refit


def losses_on(ids):
    return ridge_losses(*TRAIN.tensors, ids, *TEST.tensors, DECAY, len(TRAIN))


def test_exact_leave_one_out_is_perfect_against_itself_and_random_is_not(tmp_path):
    asker, refit = asked(tmp_path)
    scores = asker.score(LeaveOneOut(), TEST)
    bank = refit.bank(TEST, leave_out=[3, 17, 5, 0, 11, 8])
    found = evaluate(scores, bank)
    for name in ("pearson", "spearman", "slope"):
        assert found.metrics[name] == pytest.approx(1.0, abs=1e-9)
        assert abs(found.baselines["random"][name] - 1) > 0.3
    assert found.beats_random
    assert found.ceiling == 1.0
    half = Scores(scores.values / 2, None, scores.train_ids, scores.query_ids, method="half")
    assert evaluate(half, bank).metrics["slope"] == pytest.approx(0.5, abs=1e-9)
    torch.testing.assert_close(bank.changes, leave_one_out(losses_on, 20)[:, [3, 17, 5, 0, 11, 8]], rtol=0, atol=1e-12)


def test_linear_datamodeling_is_that_of_loops(tmp_path):
    asker, refit = asked(tmp_path)
    scores = asker.score(LeaveOneOut(), TEST)
    bank = refit.bank(TEST, n_subsets=30, fraction=0.75)
    assert bank.membership.sum(1).tolist() == [15] * 30
    losses = torch.stack([losses_on(row.nonzero()[:, 0].tolist()) for row in bank.membership])
    torch.testing.assert_close(bank.mean, losses, rtol=0, atol=1e-12)
    found = evaluate(scores, bank)
    assert found.metrics["lds"] == pytest.approx(correlation_over_subsets(scores.values, bank.membership, losses))
    assert found.metrics["lds_low"] > found.baselines["random"]["lds_high"]
    assert "noise ceiling of rank correlations: 1.00" in repr(found)
    assert "lds" in repr(found)


def test_noise_ceiling_is_what_the_mean_over_all_seeds_reaches(tmp_path):
    asker, refit = asked(tmp_path, noise=0.5)
    bank = refit.bank(TEST, n_subsets=60, n_seeds=6)
    assert bank.losses.shape == (60, 6, 6)
    assert not torch.equal(bank.losses[:, 0], bank.losses[:, 1])
    found = evaluate(asker.score(LeaveOneOut(), TEST), bank)
    rows = [row.nonzero()[:, 0].tolist() for row in bank.membership]
    truth = torch.stack([losses_on(ids) for ids in rows])  # without noise: the mean, but for a constant
    reached = sum(
        torch.corrcoef(torch.stack([column.argsort().argsort().double() for column in (a, b)]))[0, 1]
        for a, b in zip(truth.T, bank.mean.T, strict=True)
    )
    assert found.ceiling == pytest.approx(float(reached) / 6, abs=0.1)
    assert 0.2 < found.ceiling < 0.98
    single = evaluate(asker.score(LeaveOneOut(), TEST), refit.bank(TEST, n_subsets=5))
    assert single.ceiling != single.ceiling  # NaN
    assert "n_seeds=2" in " ".join(single.notes)


def test_wrong_labels_beside_the_plain_loss(tmp_path):
    asker, refit = asked(tmp_path)
    wrong = torch.zeros(20)
    wrong[[2, 9, 13]] = 1
    scores = asker.score(LeaveOneOut(), TEST)
    found = evaluate(scores, refit.bank(TEST, n_subsets=5), mislabelled=wrong)
    own = ridge_losses(*TRAIN.tensors, range(20), *TRAIN.tensors, DECAY, 20)
    assert found.baselines["plain loss"]["auroc"] == pytest.approx(roc_auc_score(wrong, own))
    assert found.metrics["auroc"] == pytest.approx(roc_auc_score(wrong, -scores.values.mean(0)))
    assert "auroc" in found.baselines["random"]
    given = evaluate(scores, refit.bank(TEST, n_subsets=5), mislabelled=wrong, suspicion=wrong)
    assert given.metrics["auroc"] == 1.0


def test_subset_removal_trains_without_the_strongest_proponents(tmp_path):
    asker, refit = asked(tmp_path)
    scores = asker.score(LeaveOneOut(), TEST)
    metric = subset_removal(scores, refit, 3)
    expected = torch.zeros(6).double()
    for q in range(6):
        out = scores.values[q].argsort(descending=True)[:3].tolist()
        expected[q] = (losses_on([i for i in range(20) if i not in out]) - losses_on(range(20)))[q]
    assert float(metric.compute()["increase"]) == pytest.approx(float(expected.mean()), abs=1e-12)
    opponents = Scores(-scores.values, None, scores.train_ids, scores.query_ids, method="opponents")
    assert float(subset_removal(opponents, refit, 3, TEST).compute()["increase"]) < 0


def test_failed_models_do_not_count(tmp_path):
    asker, refit = asked(tmp_path, fail={4})
    with pytest.warns(UserWarning, match="failed"):
        bank = refit.bank(TEST, leave_out=[3, 4, 5])
    scores = asker.score(LeaveOneOut(examples=(3, 5)), TEST)
    found = evaluate(scores, bank)
    assert found.metrics["pearson"] == pytest.approx(1.0)
    assert [note for note in found.notes if "without [4]" in note]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, r: evaluate(s, r.bank(data(3), 4)), ValueError, "bank's 3 queries and 20 training examples, got 6"),
        (lambda s, r: evaluate(part(s), r.bank(TEST, 4)), ValueError, r"no scores of the training examples \[2, 3"),
        (lambda s, r: r.bank(TEST, fraction=1.0), ValueError, "between 0 and 1, got 1.0"),
        (lambda s, r: r.bank(TEST, n_subsets=True), ValueError, "`n_subsets` to be a positive integer, got True"),
        (lambda s, r: r.bank(TEST, n_seeds=1.5), ValueError, "`n_seeds` to be a positive integer, got 1.5"),
        (
            lambda s, r: subset_removal(s, r, 2, n_seeds=True),
            ValueError,
            "`n_seeds` to be a positive integer, got True",
        ),
        (lambda s, r: r.bank(TEST, leave_out=[20]), ValueError, r"ids below 20, got \[20\]"),
        (lambda s, r: subset_removal(s, Refit(), 2), MissingEvidence, "Pass it to `Attributor"),
        (lambda s, r: subset_removal(s, fresh(r), 2), ValueError, "Pass their dataset"),
        (lambda s, r: subset_removal(s, r, 2, data(3)), ValueError, "6 queries, got 3"),
    ],
)
def test_errors(tmp_path, call, error, message):
    asker, refit = asked(tmp_path)
    scores = asker.score(LeaveOneOut(examples=tuple(range(20))), TEST)
    with pytest.raises(error, match=message):
        call(scores, refit)


def part(scores):
    return Scores(scores.values[:, :2], None, scores.train_ids[:2], scores.query_ids, method="part")


def fresh(refit):
    refit.asked = None
    return refit
