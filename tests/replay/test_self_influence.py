"""Self-influence of HyDRA, by replay and as followed during the fit, against autograd through the fit written out."""

import pytest
import torch
from oracles import assert_scores
from oracles_during import fast_influence
from oracles_dynamic import call, influence
from torch.nn import functional as F

from lightning_influence import HyDRA
from lightning_influence.numerics.optimizers import UpdateRule, add_rule
from replay.runs import N, fitted, joint

CASES = {
    "momentum, two groups": {
        "groups": ({"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5, "nesterov": True, "lr": 0.03})
    },
    "accumulation, clipping by norm": {"divisor": 2, "clip": ("norm", 0.3), "groups": ({"momentum": 0.9},)},
    "clipping by value, sum": {"clip": ("value", 0.05), "summed": True, "lr": 0.01},
    "adamw, clipping by norm": {"kind": "AdamW", "clip": ("norm", 0.3), "lr": 0.01},
    "cnn": {"net": "cnn", "groups": ({"momentum": 0.9},)},
    "dropout": {"net": "dropout"},
}
IN_CORE = ("momentum, two groups", "accumulation, clipping by norm", "adamw, clipping by norm")
ALL = [pytest.param(name, marks=[] if name in IN_CORE else pytest.mark.slow) for name in CASES]


def expected(fit, unrolled, run=None):
    """[example]: each training example's own column of what is derived with the training examples as queries."""

    def losses(module, params):
        x, y, _ = fit.data.tensors
        return F.cross_entropy(call(module.eval(), params, x), y, reduction="none")

    return unrolled(run or fit.run, losses, len(fit.data)).diagonal()


@pytest.mark.parametrize("hessian", [True, False])
@pytest.mark.parametrize("case", ALL)
def test_by_replay_it_is_the_diagonal_of_autograd_through_the_fit(case, hessian, tmp_path):
    fit = fitted(tmp_path, **CASES[case])
    found = fit.attributor().self_influence(HyDRA(hessian=hessian))
    assert_scores(found.values, expected(fit, influence if hessian else fast_influence), 1e-9)
    assert found.units == "loss"
    assert "agreement" not in found.diagnostics


@pytest.mark.parametrize("hessian", [True, False])
@pytest.mark.parametrize("case", ALL)
def test_as_followed_during_the_fit_it_is_the_same(case, hessian, tmp_path):
    method = HyDRA.during_fit(hessian=hessian)
    fit = fitted(tmp_path, methods=[method], self_influence=True, max_cost=1e9, **CASES[case])
    right = expected(fit, influence if hessian else fast_influence)
    assert_scores(fit.influence.self_scores["HyDRA"].values, right, 1e-9)
    assert_scores(fit.attributor(batch_size=2).self_influence(method).values, right, 1e-9)


@pytest.mark.parametrize("hessian", [True, False])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_only_the_examples_that_are_asked_for_have_it(kind, hessian, tmp_path):
    during = HyDRA.during_fit(hessian, examples=(7, 2, 5))
    fit = fitted(tmp_path, methods=[during], max_cost=1e9, kind=kind, lr=0.01)
    right = expected(fit, influence if hessian else fast_influence)[[2, 5, 7]]
    for method in (HyDRA(hessian=hessian, examples=(7, 2, 5)), during):
        found = fit.attributor().self_influence(method)
        assert found.train_ids.tolist() == [2, 5, 7]
        assert_scores(found.values, right, 1e-9)


@pytest.mark.parametrize("loss", [None, joint])
def test_more_examples_than_parameters_take_a_query_per_parameter(loss, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_influence.methods.hydra._QUERY_BYTES", 8 * 8 * 43 * 10)  # ten at once
    fit = fitted(tmp_path, n=50, epochs=1, groups=({"momentum": 0.9},))
    assert sum(p.numel() for p in fit.module.parameters()) == 43
    assert_scores(fit.attributor(loss).self_influence(HyDRA()).values, expected(fit, influence), 1e-9)


@pytest.mark.parametrize("hessian", [True, False])
@pytest.mark.parametrize("settings", [{"divisor": 2}, {"clip": ("norm", 0.3), "kind": "AdamW", "lr": 0.01}])
def test_renormalized_removal(settings, hessian, tmp_path):
    fit = fitted(tmp_path, **settings)
    method = HyDRA(hessian=hessian, removal="renormalize", checks=0)
    if hessian:
        right = expected(fit, influence, fit.renormalized())
    else:
        right = fit.attributor().score(method, "train").values.diagonal()
    assert_scores(fit.attributor().self_influence(method).values, right, 1e-9)


def test_with_several_runs_it_is_the_mean_of_their_own(tmp_path):
    fit = fitted(tmp_path)
    method = HyDRA(runs=2, checks=0)
    pairs = fit.attributor().score(method, "train").values
    assert_scores(fit.attributor().self_influence(method).values, pairs.diagonal(), 1e-9)


def test_the_estimate_counts_every_block_of_examples(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_influence.methods.hydra._QUERY_BYTES", 8 * 8 * 43 * 3)
    fit = fitted(tmp_path)
    with fit.attributor().session() as setting:
        seen = HyDRA()._own_blocks(setting)
    assert [len(block.ids) for block in seen] == [3, 3, 3, N - 9]


def test_without_the_hessian_all_examples_take_one_walk(tmp_path, monkeypatch):
    fit = fitted(tmp_path, kind="AdamW", lr=0.01)
    expected_values = fit.attributor(joint).self_influence(HyDRA(hessian=False)).values  # joint: as queries
    monkeypatch.setattr("lightning_influence.methods.hydra.adjoint", None)
    assert_scores(fit.attributor().self_influence(HyDRA(hessian=False)).values, expected_values, 1e-9)


class MixingRule(UpdateRule):
    """SGD along the gradient and its mean."""

    def step(self, at):
        return at.weight - at.options["lr"] * (at.gradient + 0.3 * at.gradient.mean()), {}


class Mixing(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad + 0.3 * p.grad.mean()))
        return loss


def test_an_optimizer_that_mixes_entries_takes_the_examples_as_queries(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "Mixing", Mixing, raising=False)
    monkeypatch.setattr("lightning_influence.numerics.optimizers.groups._RULES", {})
    add_rule("Mixing", MixingRule())
    fit = fitted(tmp_path, kind="Mixing")
    method = HyDRA(hessian=False, checks=0)
    pairs = fit.attributor().score(method, "train").values
    assert_scores(fit.attributor().self_influence(method).values, pairs.diagonal(), 1e-9)
