"""HyDRA by replay against autograd through the whole fit written out, in float64, and its exact identities."""

import dataclasses

import pytest
import torch
from oracles import assert_scores
from oracles_during import fast_influence
from oracles_dynamic import influence, losses_at
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_influence import Attributor, HyDRA, MissingEvidence, TracIn, Trajectory
from lightning_influence.replay.refit_agreement import removals
from lightning_influence.replay.replay import DriftError
from replay.runs import QUERIES, N, data, fitted, joint

CASES = {
    "sgd": {},
    "momentum, two groups": {
        "groups": ({"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5, "nesterov": True, "lr": 0.03})
    },
    "dampening": {"groups": ({"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},)},
    "maximize": {"groups": ({"momentum": 0.9, "maximize": True},), "lr": 0.02},
    "accumulation, clipping by norm": {"divisor": 2, "clip": ("norm", 0.3), "groups": ({"momentum": 0.9},)},
    "clipping by value, sum": {"clip": ("value", 0.05), "summed": True, "lr": 0.01},
    "adam": {"kind": "Adam", "groups": ({"weight_decay": 0.1, "betas": (0.8, 0.95)},), "lr": 0.01},
    "adamw, clipping by norm": {"kind": "AdamW", "clip": ("norm", 0.3), "lr": 0.01},
    "cnn": {"net": "cnn", "groups": ({"momentum": 0.9},)},
    "cnn, adamw": {"net": "cnn", "kind": "AdamW", "lr": 0.01, "divisor": 2},
    "transformer": {"net": "transformer", "groups": ({"momentum": 0.9, "weight_decay": 0.01},)},
    "transformer, adam": {"net": "transformer", "kind": "Adam", "lr": 0.01, "groups": ({"eps": 1e-3},)},
    "dropout": {"net": "dropout", "divisor": 2},
    "batchnorm": {"net": "batchnorm", "divisor": 2},
    "augmentation": {"noisy": True, "divisor": 2, "groups": ({"momentum": 0.9},)},
}
IN_CORE = ("momentum, two groups", "accumulation, clipping by norm", "adam", "dropout", "batchnorm")
SLOW = [pytest.param(name, marks=[] if name in IN_CORE else pytest.mark.slow) for name in CASES]


def plain(**settings):
    return HyDRA(**{"checks": 0, **settings})


def scores(fit, method=None, loss=None):
    return fit.attributor(loss).score(method or plain(), fit.queries)


@pytest.mark.parametrize("case", SLOW)
def test_it_is_autograd_through_the_whole_fit(case, tmp_path):
    fit = fitted(tmp_path, **CASES[case])
    with sdpa_kernel(SDPBackend.MATH):
        expected = influence(fit.run, fit.query_losses, N)
    for loss in (joint,) if case == "batchnorm" else (None, joint):
        found = scores(fit, loss=loss)
        assert_scores(found.values, expected, 1e-9)
        assert found.figures["drift"] <= 1e-10
        assert found.units == "loss"


@pytest.mark.parametrize("case", SLOW)
def test_without_the_hessian_it_is_its_own_recursion(case, tmp_path):
    fit = fitted(tmp_path, **CASES[case])
    with sdpa_kernel(SDPBackend.MATH):
        expected = fast_influence(fit.run, fit.query_losses, N)
    for loss in (joint,) if case == "batchnorm" else (None, joint):
        assert_scores(scores(fit, plain(hessian=False), loss).values, expected, 1e-9)


def _penalty(net):
    return 0.1 * sum(p.square().sum() for p in net.parameters())


def _apart(net, x, y):
    return F.cross_entropy(net(x), y, reduction="none")


def _crowded(net, x, y):
    hidden = net[:2](x)
    return F.cross_entropy(net[2:](hidden), y) + hidden.square().sum(1).mean()


STEPS = {
    "by hand": (lambda net, x, y: (net(x).logsumexp(1) - net(x)[range(len(y)), y]).mean(), _apart),
    "backwards": (lambda net, x, y: F.cross_entropy(net(x).flip(0), y.flip(0)), _apart),
    "twice": (lambda net, x, y: F.cross_entropy(torch.cat([net(x)] * 2), torch.cat([y] * 2)), _apart),
    "classes first": (lambda net, x, y: F.cross_entropy(net(x).T[None], y[None]), _apart),
    "with a penalty": (
        lambda net, x, y: F.cross_entropy(net(x), y) + _penalty(net),
        lambda net, x, y: _apart(net, x, y) + _penalty(net),
    ),
    "of hidden values": (
        _crowded,
        lambda net, x, y: _apart(net, x, y) + net[:2](x).square().sum(1),
    ),
}


class Written(nn.Module):
    """A function of a network and a batch, as a module."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x, y):
        return self.function(self.net, x, y)


def assert_exact(folder, written, apart):
    """HyDRA of a fit under a loss, of which ``apart`` gives each example's."""
    fit = fitted(folder, groups=({"momentum": 0.9},), step=written)

    def losses(module, params, batch):
        named = {f"net.{name}": p for name, p in params.items()}
        return functional_call(Written(module, apart), named, tuple(batch[:2]))

    fit.run.losses = losses
    expected = influence(fit.run, lambda module, params: losses(module, params, fit.queries.tensors), N)
    assert_scores(scores(fit).values, expected, 1e-9)


@pytest.mark.parametrize("step", STEPS)
def test_however_the_loss_is_written(step, tmp_path):
    """Examples are told apart where the network ends, unless the loss is more than that or changes their order."""
    assert_exact(tmp_path, *STEPS[step])


def test_a_loss_that_is_more_for_some_examples(tmp_path):
    """Not for those that are walked through first."""
    last = fitted(tmp_path / "order").module.seen[-1]
    inputs = data("mlp", N, 0).tensors[0][:, 0]
    high = inputs[last].max()
    assert bool((inputs > high).any())

    def more(net, x, y):
        return net[:2](x).square().sum(1) * (x[:, 0] > high)

    assert_exact(
        tmp_path / "more",
        lambda net, x, y: F.cross_entropy(net(x), y) + more(net, x, y).mean(),
        lambda net, x, y: _apart(net, x, y) + more(net, x, y),
    )


def test_it_is_what_happens_when_a_weight_changes_a_little(tmp_path):
    fit = fitted(tmp_path, groups=({"momentum": 0.9, "weight_decay": 0.1},))
    found, step = scores(fit).values, 1e-5
    for example in (0, 4):
        way = torch.zeros(N, dtype=torch.float64)
        way[example] = step
        up, down = (losses_at(fit.run, fit.query_losses, torch.ones_like(way) + s * way) for s in (1, -1))
        torch.testing.assert_close(found[:, example], -(up - down) / (2 * step), rtol=1e-6, atol=1e-9)


def test_renormalised_removal(tmp_path):
    fit = fitted(tmp_path, divisor=2)
    found = scores(fit, plain(removal="renormalize")).values
    assert_scores(found, influence(fit.renormalized(), fit.query_losses, N), 1e-9)
    assert_scores(scores(fit, plain(removal="renormalize", hessian=False)).values.sum(1), torch.zeros(4), 1e-15)
    summed = fitted(tmp_path / "sum", summed=True, lr=0.01)
    assert any("here: the loss is a sum" in note for note in scores(summed, plain(removal="renormalize")).notes)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "nesterov": True}], ids=["sgd", "nesterov"])
def test_all_scores_together_are_the_derivative_by_the_learning_rate(settings, tmp_path):
    """I4: without weight decay, examples' weights and learning rates scale the same steps."""
    fit = fitted(tmp_path, groups=(settings,))

    def end(scale):
        run = dataclasses.replace(fit.run, rates=[[scale * lr for lr in rates] for rates in fit.run.rates])
        return losses_at(run, fit.query_losses, torch.ones(N, dtype=torch.float64))

    slope = (end(1 + 1e-5) - end(1 - 1e-5)) / 2e-5
    torch.testing.assert_close(scores(fit).values.sum(1), -slope, rtol=1e-6, atol=1e-9)


def test_scores_of_adam_sum_to_zero(tmp_path):
    """I4': steps of Adam do not see the size of the loss."""
    fit = fitted(tmp_path, kind="AdamW", groups=({"eps": 1e-30, "weight_decay": 0.1},), lr=0.01)
    found = scores(fit).values
    assert float(found.sum(1).abs().max()) <= 1e-10 * float(found.abs().max())


def test_checkpoints_make_no_difference(tmp_path):
    every = [
        scores(fitted(tmp_path / str(steps), every_n_epochs=0, every_n_train_steps=steps)).values
        for steps in (1, 2, 100)
    ]
    assert_scores(every[1], every[0], 1e-14)
    assert_scores(every[2], every[0], 1e-14)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_accumulated_micro_batches_are_one_batch(kind, tmp_path):
    """I21."""
    momentum = {"momentum": 0.9} if kind == "SGD" else {}
    options = {"kind": kind, "groups": ({"weight_decay": 0.1, **momentum},), "lr": 0.01, "n": 16}
    whole = fitted(tmp_path / "whole", **options, loader={"batch_size": 8})
    parts = fitted(tmp_path / "parts", **options, divisor=2)
    assert [ids for pair in zip(parts.module.seen[::2], parts.module.seen[1::2], strict=True) for ids in pair] == [
        half for ids in whole.module.seen for half in (ids[:4], ids[4:])
    ]
    for method in (plain(), plain(hessian=False), TracIn()):
        assert_scores(scores(parts, method).values, scores(whole, method).values, 1e-10)


def test_the_mean_of_queries_has_the_mean_of_their_scores(tmp_path):
    fit = fitted(tmp_path)
    each = scores(fit).values
    together = fit.attributor().score(plain(), fit.queries, aggregate="mean").values
    assert_scores(together, each.mean(0, keepdim=True), 1e-12)


def test_an_example_that_was_never_drawn_has_no_influence(tmp_path):
    fit = fitted(tmp_path, limit=1, epochs=1)
    seen = {i for ids in fit.module.seen for i in ids}
    found = scores(fit).values
    assert len(seen) == 4
    for example in range(N):
        assert bool((found[:, example] != 0).any()) == (example in seen)


RUNS = {
    "momentum, clipping, accumulation": {
        "divisor": 2,
        "clip": ("norm", 0.3),
        "groups": ({"momentum": 0.9, "weight_decay": 0.1},),
    },
    "adamw, sum": {"kind": "AdamW", "lr": 0.01, "summed": True},
    "batches of one": {"loader": {"batch_size": 1}, "groups": ({"momentum": 0.9, "weight_decay": 0.1},)},
}


@pytest.mark.parametrize("case", RUNS)
def test_several_runs_are_the_mean_derivative_at_fits_without_a_tenth(case, tmp_path):
    fit = fitted(tmp_path, **RUNS[case])
    left_out = removals(N, 3, seed=1)
    assert len({tuple(row.tolist()) for row in left_out}) > 1
    expected = sum(influence(fit.run, fit.query_losses, N, at) for at in left_out) / 3
    assert_scores(scores(fit, plain(runs=3)).values, expected, 1e-9)
    assert fit.attributor().cost(plain(runs=3), fit.queries) > fit.attributor().cost(plain(), fit.queries)


def test_several_runs_are_refused_where_a_part_of_a_batch_is_another_thing(tmp_path):
    with pytest.raises(ValueError, match=r"`runs=1` where training draws random numbers \(dropout, augmentation\)"):
        scores(fitted(tmp_path / "dropout", net="dropout"), plain(runs=2))
    with pytest.raises(ValueError, match="`runs=1` where `loss=` gives the losses of joint batches"):
        scores(fitted(tmp_path / "joint"), plain(runs=2), joint)


@pytest.mark.parametrize("removal", ["downweight", "renormalize"])
def test_agreement_is_the_correlation_with_what_happens_without_a_tenth(removal, tmp_path):
    fit = fitted(tmp_path, groups=({"momentum": 0.9},), n=30)
    method = HyDRA(checks=6, removal=removal)
    found = scores(fit, method)
    run = fit.run if removal == "downweight" else fit.renormalized()
    left_out = removals(30, 6)
    assert (left_out == 0).sum(1).tolist() == [3] * 6
    truth = torch.stack([losses_at(run, fit.query_losses, w) for w in left_out])
    foreseen = [[sum(found.values[q, i] for i in range(30) if w[i] == 0) for q in range(QUERIES)] for w in left_out]
    each = [torch.corrcoef(torch.stack([truth[:, q], torch.tensor(foreseen)[:, q]]))[0, 1] for q in range(QUERIES)]
    assert found.figures["agreement"] == pytest.approx(float(sum(each)) / QUERIES, rel=1e-6)
    halves = fit.attributor().score(method, fit.queries, aggregate="mean")
    together = torch.corrcoef(torch.stack([truth.mean(1), torch.tensor(foreseen).mean(1)]))[0, 1]
    assert halves.figures["agreement"] == pytest.approx(float(together), rel=1e-6)


def test_what_a_reader_must_know_is_reported(tmp_path):
    fit = fitted(tmp_path, lr=3.0, epochs=6, groups=({"momentum": 0.9},))
    found = scores(fit, HyDRA())
    assert -1 <= found.figures["agreement"] < 0.8
    assert any("Agreement is" in note for note in found.notes)
    smooth = scores(fitted(tmp_path / "smooth", lr=0.01, n=30), HyDRA())
    assert 0.8 < smooth.figures["agreement"] <= 1
    assert not any("Agreement is" in note for note in smooth.notes)
    about = [note for note in smooth.notes if "without a random tenth" in note or "each without" in note]
    assert len(about) == 1
    assert "does not say that the scores predict what happens without half of them" in about[0]
    assert not any("half of them" in note for note in scores(fit, HyDRA(checks=0)).notes)
    assert fit.attributor().cost(HyDRA(), fit.queries) > 0


def test_wrong_settings_and_missing_evidence(tmp_path):
    for settings, message in (
        ({"mode": "x"}, "`mode` to be one of 'replay', 'during_fit'"),
        ({"removal": "x"}, "`removal` to be one of"),
        ({"max_drift": 0.0}, "`max_drift` to be a positive number, got 0.0"),
        ({"checks": 1}, "`checks` to be 0 or at least 2 refits, got 1"),
        ({"checks": True}, "`checks` to be an integer of at least 0, got True"),
        ({"checks": 2.5}, "`checks` to be an integer of at least 0, got 2.5"),
        ({"runs": 0}, "`runs` to be a positive integer, got 0"),
        ({"runs": True}, "`runs` to be a positive integer, got True"),
        ({"max_drift": True}, "`max_drift` to be a positive number, got True"),
        (
            {"runs": 2, "mode": "during_fit"},
            "`mode='replay'` and `removal='downweight'` for `runs=2`, got 'during_fit'",
        ),
        ({"runs": 2, "removal": "renormalize"}, "for `runs=2`, got 'replay' and 'renormalize'"),
        ({"mode": "during_fit", "removal": "renormalize"}, r"`mode='replay'` for `removal='renormalize'`"),
    ):
        with pytest.raises(ValueError, match=message):
            HyDRA(**settings)
    fit = fitted(tmp_path)
    final = tmp_path / "final.ckpt"
    fit.trainer.save_checkpoint(final)
    files = Trajectory.from_checkpoints([final], learning_rates=0.1)
    bare = Attributor(fit.module, fit.data, files, fit.trainer)
    with pytest.raises(MissingEvidence, match="steps were captured, so that it can be replayed, got 1 checkpoints"):
        bare.score(plain(), fit.queries)
    some = Attributor(fit.module, fit.data, fit.influence.trajectory, fit.trainer, parameters="*weight")
    with pytest.raises(ValueError, match=r"got `parameters=` without `net\.0\.bias`"):
        some.score(plain(), fit.queries)
    fit.data.tensors[0].add_(1.0)
    with pytest.raises(ValueError, match="Expected `train` to give the batches that were trained on"):
        scores(fit)
    with pytest.raises(DriftError, match="end at the fit's weights"):
        fit.attributor(check_data=False).score(plain(), fit.queries)
