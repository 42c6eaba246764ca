"""`evaluate` of several methods: paired intervals are those of loops, and what cannot be compared is named."""

import math

import pytest
import torch
from oracles_retraining import paired_difference, paired_interval

from lightning_influence import Scores, SelfScores
from lightning_influence.metrics import comparison, evaluate
from lightning_influence.refit import Bank

QUERIES, SUBSETS, TRAIN = 5, 12, 9


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


TRUE = drawn(0, QUERIES, TRAIN)


def bank(leave_one_out=False):
    if leave_one_out:
        membership = ~torch.eye(TRAIN).bool()
    else:
        draw = torch.Generator().manual_seed(1)
        membership = torch.stack([torch.randperm(TRAIN, generator=draw) < 5 for _ in range(SUBSETS)])
    losses = -(TRUE @ membership.double().T).T + 0.3 * drawn(2, len(membership), QUERIES)
    return Bank(membership, losses[:, None], -TRUE.sum(1)[None], torch.arange(QUERIES), deterministic=True)


def scores(values, **options):
    ids = {"train_ids": torch.arange(values.shape[1]), "query_ids": torch.arange(len(values))} | options
    return Scores(values, None, **ids, method="any", allow_nan=True)


def noisy(noise, seed=7):
    return TRUE + noise * drawn(seed, QUERIES, TRAIN)


METHODS = {"far": noisy(3.0), "near": noisy(0.2), "nearer": noisy(0.19, 8)}


def compared(methods=METHODS, leave_one_out=False, **options):
    return evaluate({name: scores(values) for name, values in methods.items()}, bank(leave_one_out), **options)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_differences_and_their_intervals_are_those_of_loops(leave_one_out, monkeypatch):
    monkeypatch.setattr(comparison, "_RESAMPLES", 30)
    found, truth = compared(leave_one_out=leave_one_out, seed=3), bank(leave_one_out)
    if leave_one_out:
        predicted, actual = METHODS, truth.changes
    else:
        predicted = {name: values @ truth.membership.double().T for name, values in METHODS.items()}
        actual = -truth.mean.T
    assert set(found.differences) == set(METHODS) - {found.best}
    for name, difference in found.differences.items():
        pair = (predicted[found.best], predicted[name], actual)
        assert difference.value == pytest.approx(paired_difference(*pair, range(actual.shape[1]), range(QUERIES)))
        ends = paired_interval(*pair, 30, 3, 1 - 0.05 / 2)
        assert (difference.low, difference.high) == pytest.approx(tuple(ends))


def test_each_methods_metrics_are_those_of_the_single_form():
    found = compared()
    for name, values in METHODS.items():
        assert found.metrics[name] == evaluate(scores(values), bank()).metrics
        assert found.evaluations[name] == evaluate(scores(values), bank())


def test_the_best_comes_first_and_only_what_is_clear_is_distinguishable():
    found = compared()
    assert list(found.evaluations)[2] == "far"
    assert found.differences["far"].distinguishable
    (close,) = {"near", "nearer"} - {found.best}
    assert not found.differences[close].distinguishable


def test_paired_differences_are_told_apart_where_the_metrics_intervals_overlap():
    base = {"a": TRUE + 0.8 * drawn(4, QUERIES, TRAIN)}
    base["b"] = base["a"] + 0.5 * drawn(5, QUERIES, TRAIN)  # the same errors and some more
    draw = torch.Generator().manual_seed(1)
    membership = torch.stack([torch.randperm(TRAIN, generator=draw) < 5 for _ in range(80)])
    losses = -(TRUE @ membership.double().T).T
    many = Bank(membership, losses[:, None], -TRUE.sum(1)[None], torch.arange(QUERIES), deterministic=True)
    found = evaluate({name: scores(values) for name, values in base.items()}, many)
    assert found.metrics["b"]["lds_high"] > found.metrics["a"]["lds_low"]
    width = found.differences["b"].high - found.differences["b"].low
    assert width < found.metrics["b"]["lds_high"] - found.metrics["b"]["lds_low"]


@pytest.mark.parametrize("count", [2, 6])
def test_of_equally_good_methods_few_are_said_to_differ(count):
    flagged = 0
    for seed in range(4):
        methods = {f"m{k}": noisy(1.0, 100 * (seed + 1) + k) for k in range(count)}
        flagged += any(d.distinguishable for d in compared(methods).differences.values())
    assert flagged <= 1


def test_wrong_labels_are_ranked_by_each_methods_own_scores_or_by_what_is_given():
    wrong = torch.zeros(TRAIN)
    wrong[[1, 5]] = 1
    found = compared(mislabelled=wrong, suspicion={"far": wrong})
    assert found.metrics["far"]["auroc"] == 1.0
    assert found.metrics["near"]["auroc"] == evaluate(scores(METHODS["near"]), bank(), wrong).metrics["auroc"]


# ---- one table -------------------------------------------------------------------------------------------------------


def test_one_table_of_all_methods_and_baselines():
    lines = repr(compared()).splitlines()
    best = compared().best
    assert lines[0].split() == ["lds", "behind", best, "distinguishable", "pearson", "queries", "left", "out"]
    assert [line.split()[0] for line in lines[1:5]] == [*compared().evaluations, "random"]
    assert lines[1].split()[0] == best
    assert " yes " in lines[3]
    assert " no " in lines[2]
    assert len({len(line) for line in lines[:4]}) == 1
    assert "the same resamples" in lines[5]
    assert "noise ceiling of rank correlations: 1.00" in lines[-1]


def test_one_method_has_no_differences():
    found = compared({"only": METHODS["near"]})
    assert found.best == "only"
    assert found.differences == {}
    assert "behind" not in repr(found)


def test_names_with_line_breaks_stay_in_their_row():
    found = compared({"a\nb": METHODS["near"], "": METHODS["far"]})
    assert "a b" in repr(found).splitlines()[1]


def test_identical_scores_differ_by_nothing():
    found = compared({"one": METHODS["near"], "two": METHODS["near"].clone()})
    difference = found.differences["two"]
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert not difference.distinguishable


def test_undefined_methods_come_last_and_are_unknown():
    nothing = torch.full((QUERIES, TRAIN), torch.nan).double()
    found = compared({"constant": torch.ones(QUERIES, TRAIN).double(), "nan": nothing, **METHODS})
    assert list(found.evaluations)[3:] == ["constant", "nan"]
    for name in ("constant", "nan"):
        assert math.isnan(found.differences[name].value)
        assert not found.differences[name].distinguishable
        row = next(line for line in repr(found).splitlines() if line.startswith(name))
        assert " unknown " in row
        assert row.split()[-1] == str(QUERIES)
    assert "queries left out: those whose" in repr(found)
    assert "queries left out: those" not in repr(compared())
    alone = compared({"constant": torch.ones(QUERIES, TRAIN).double(), "nan": nothing})
    assert alone.best is None
    assert alone.differences == {}
    assert "nan" in repr(alone)


def test_a_query_that_is_undefined_for_one_method_is_left_out_of_its_difference():
    holed = METHODS["far"].clone()
    holed[2, 3] = torch.nan
    found, truth = compared({"near": METHODS["near"], "holed": holed}), bank()
    predicted = [values @ truth.membership.double().T for values in (METHODS["near"], holed)]
    expected = paired_difference(*predicted, -truth.mean.T, range(SUBSETS), [0, 1, 3, 4])
    assert found.differences["holed"].value == pytest.approx(expected)


# ---- what cannot be compared -----------------------------------------------------------------------------------------


GOOD = scores(METHODS["near"])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "at least one method, got an empty dict"),
        ({1: GOOD}, TypeError, "names of `scores` to be strings, got 1"),
        ([GOOD, GOOD], TypeError, r"`scores` to be `Scores`.*got list\. For several methods, pass a dict"),
        ({"a": GOOD.values}, TypeError, r"`scores\['a'\]` to be `Scores`, \[query, train\], got Tensor"),
        (
            {"a": GOOD, "b": SelfScores(torch.arange(TRAIN), torch.ones(TRAIN), method="b")},
            TypeError,
            r"`scores\['b'\]` to be `Scores`.*got SelfScores\. Pass self-influence as `suspicion`",
        ),
        ({"a": GOOD, "b": scores(METHODS["far"][:3])}, ValueError, r"`scores\['b'\]` to be of the bank's 5 queries"),
        ({"a": GOOD, "b": scores(METHODS["far"][:, :4])}, ValueError, r"`scores\['b'\]`.*no scores of the training"),
        (
            {"a": GOOD, "b": scores(METHODS["far"], query_ids=torch.tensor([0, 1, 2, 3, 9]))},
            ValueError,
            "the same queries, got query 4 of 'a' where 'b' has query 9",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(given, error, message):
    with pytest.raises(error, match=message):
        evaluate(given, bank())


@pytest.mark.parametrize(
    ("suspicion", "error", "message"),
    [
        (torch.ones(TRAIN), TypeError, "`suspicion` of several methods to be a dict of their names, got Tensor"),
        ({"c": torch.ones(TRAIN)}, ValueError, r"among \['far', 'near', 'nearer'\], got \['c'\]"),
    ],
)
def test_suspicions_of_several_methods_need_their_names(suspicion, error, message):
    with pytest.raises(error, match=message):
        compared(mislabelled=torch.ones(TRAIN), suspicion=suspicion)
