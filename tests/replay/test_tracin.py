"""TracIn at every step against its double loop over the steps written out, in float64."""

import copy

import oracles
import pytest
import torch
from case import Step, both
from fits import fit as fit_quietly
from oracles import assert_scores
from oracles_dynamic import call, tracin
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Influence, RandomProjection, TracIn
from lightning_influence.numerics.projections import Projector
from replay.runs import N, fitted, joint

CASES = {
    "two groups": {"groups": ({"momentum": 0.9, "weight_decay": 0.1}, {"lr": 0.03})},
    "accumulation, clipping, dropout": {"divisor": 2, "clip": ("norm", 0.3), "net": "dropout"},
    "batchnorm": {"divisor": 2, "net": "batchnorm"},
    "adamw, transformer": {"kind": "AdamW", "net": "transformer", "lr": 0.01},
    "cnn, sum, maximize": {"net": "cnn", "groups": ({"maximize": True},), "summed": True, "lr": 0.02},
}
CHANGES = {
    "cosine": {"normalize": "cosine"},
    "layerwise": {"normalize": "layerwise"},
    "kronecker": {"projection": RandomProjection(5)},
    "plain": {"projection": RandomProjection(5, "plain", "gaussian", seed=1)},
    "both": {"normalize": "layerwise", "projection": RandomProjection(4, seed=2)},
}


def slow_but(names, core):
    return [pytest.param(name, marks=[] if name in core else pytest.mark.slow) for name in names]


def quiet_losses(module, params, batch):
    return F.cross_entropy(call(module.eval(), params, batch[0]), batch[1], reduction="none")


def change_of(normalize=None, projection=None):
    """What the settings say, on gradients written out."""
    projector = None if projection is None else Projector(projection)

    def change(rows):
        if normalize is not None:
            rows = oracles.unit(rows, normalize == "layerwise")
        if projector is None:
            return rows
        return {name: projector(f"net.{name}", r.shape[1:], r).rows(r) for name, r in rows.items()}

    return change


@pytest.mark.parametrize("case", slow_but(CASES, list(CASES)[:3]))
def test_it_is_the_double_loop(case, tmp_path):
    fit = fitted(tmp_path, **CASES[case])
    queries = fit.queries.tensors
    expected, own = (tracin(fit.run, quiet_losses, asked, N) for asked in (queries, None))
    for loss in (joint,) if case == "batchnorm" else (None, joint):
        attributor = fit.attributor(loss)
        found = attributor.score(TracIn(), fit.queries)
        assert_scores(found.values, expected, 1e-10)
        assert found.figures["drift"] <= 1e-11
        assert_scores(attributor.self_influence(TracIn()).values, own, 1e-10)
    mean = fit.attributor(loss).score(TracIn(), fit.queries, aggregate="mean").values
    assert_scores(mean, expected.mean(0, keepdim=True), 1e-10)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("case", slow_but([c for c in CASES if c != "batchnorm"], list(CASES)[:1]))
def test_normalised_and_projected_gradients(case, how, tmp_path):
    fit, settings = fitted(tmp_path, **CASES[case]), CHANGES[how]
    change = change_of(**settings)
    found = fit.attributor().score(TracIn(**settings), fit.queries)
    assert_scores(found.values, tracin(fit.run, quiet_losses, fit.queries.tensors, N, change), 1e-10)
    adaptive = CASES[case].get("kind") == "AdamW"
    assert (found.units == "arbitrary") == ("normalize" in settings or adaptive)
    if "normalize" in settings:
        with pytest.raises(ValueError, match="`normalize=None` for self-influence, got"):
            fit.attributor().self_influence(TracIn(**settings))
    else:
        own = fit.attributor().self_influence(TracIn(**settings)).values
        assert_scores(own, tracin(fit.run, quiet_losses, None, N, change), 1e-10)


def test_room_for_every_number_gives_the_exact_scores(tmp_path):
    fit = fitted(tmp_path, groups=({"momentum": 0.9}, {"lr": 0.03}))
    attributor = fit.attributor()
    for normalize in (None, "cosine", "layerwise"):
        exact = attributor.score(TracIn(normalize), fit.queries).values
        assert_scores(attributor.score(TracIn(normalize, RandomProjection(1000)), fit.queries).values, exact, 1e-12)


def test_its_time_is_told_beforehand(tmp_path):
    """Every step takes the queries' gradients anew: 15 times the steps take many times as long."""
    short, long = (fitted(tmp_path / str(epochs), epochs=epochs) for epochs in (2, 30))
    for queries in (short.queries, None):
        few, many = (fit.attributor().cost(TracIn(), queries) for fit in (short, long))
        assert many > 4 * few > 0


def test_units_and_settings(tmp_path):
    fit = fitted(tmp_path, kind="AdamW", lr=0.01)
    assert fit.attributor().score(TracIn(), fit.queries).units == "arbitrary"
    for settings, message in (
        ({"max_drift": -1}, "`max_drift` to be a positive number, got -1"),
        ({"max_drift": True}, "`max_drift` to be a positive number, got True"),
        ({"normalize": "x"}, "`normalize` to be one of None, 'cosine', 'layerwise', got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            TracIn(**settings)
    with pytest.raises(TypeError, match="`projection` to be a RandomProjection or None, got 5"):
        TracIn(projection=5)


@pytest.mark.parametrize("settings", [{"normalize": "cosine"}, {"projection": RandomProjection(5)}])
def test_losses_of_a_joint_batch_have_no_gradients_apart(settings, tmp_path):
    fit = fitted(tmp_path, net="batchnorm")
    with pytest.raises(ValueError, match=r"`projection=None` with `loss=`, got .*or use `TracInCP`"):
        fit.attributor(joint).score(TracIn(**settings), fit.queries)


class TwoOptimizers(Step):
    """Manual optimization; what the second optimizer moves (by nothing) is not in ``loss=``."""

    def __init__(self):
        super().__init__(nn.Linear(5, 3))
        self.automatic_optimization, self.other = False, nn.Linear(5, 3)

    def training_step(self, batch, batch_idx):
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.loss(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD(self.other.parameters(), lr=0.0)


def test_a_step_of_an_optimizer_that_the_loss_does_not_reach_adds_nothing(tmp_path):
    train, queries = both(5).values()
    module = TwoOptimizers().double()
    before = copy.deepcopy(module)
    influence = Influence(
        dirpath=tmp_path, loss=lambda m, batch: F.cross_entropy(m.net(batch[0]), batch[1], reduction="none")
    )
    fit_quietly(module, DataLoader(train(), 8), influence, max_epochs=1)
    found = influence.attributor.score(TracIn(), queries()).values
    gradients = [
        oracles.rows(before, [(x[None], y[None]) for x, y in data()], ["net.weight", "net.bias"], influence.loss)
        for data in (queries, train)
    ]
    assert_scores(found, oracles.inner(*gradients) * 0.1 / 8, 1e-10)
