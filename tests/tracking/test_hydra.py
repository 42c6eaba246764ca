"""Hypergradients followed during a fit against autograd through the same steps written out, in float64."""

import oracles_dynamic
import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from oracles import assert_scores
from oracles_during import fast_influence
from pytorch_lightning import Callback
from replay.runs import QUERIES, N, data, fitted, joint
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_influence import Attributor, HyDRA, MissingEvidence
from lightning_influence.compat import MisconfigurationException

MOMENTUM = ({"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5, "nesterov": True, "lr": 0.03})
CASES = {
    "sgd": {},
    "momentum, two groups": {"groups": MOMENTUM},
    "dampening": {"groups": ({"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},)},
    "maximize": {"groups": ({"momentum": 0.9, "maximize": True},), "lr": 0.02},
    "accumulation, clipping by norm": {"divisor": 2, "clip": ("norm", 0.3), "groups": ({"momentum": 0.9},)},
    "clipping by value, sum": {"clip": ("value", 0.05), "summed": True, "lr": 0.01},
    "sum": {"summed": True, "lr": 0.02},
    "adam": {"kind": "Adam", "groups": ({"weight_decay": 0.1, "betas": (0.8, 0.95)},), "lr": 0.01},
    "adamw": {"kind": "AdamW", "groups": ({"weight_decay": 0.1},), "lr": 0.01},
    "adamw, clipping by norm": {"kind": "AdamW", "clip": ("norm", 0.3), "lr": 0.01},
    "cnn": {"net": "cnn", "groups": ({"momentum": 0.9},)},
    "cnn, adamw": {"net": "cnn", "kind": "AdamW", "lr": 0.01, "divisor": 2},
    "transformer": {"net": "transformer", "groups": ({"momentum": 0.9, "weight_decay": 0.01},)},
    "transformer, adam": {"net": "transformer", "kind": "Adam", "lr": 0.01, "groups": ({"eps": 1e-3},)},
    "dropout": {"net": "dropout", "divisor": 2},
}
IN_CORE = ("momentum, two groups", "accumulation, clipping by norm", "adam")


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


ALL = [name if name in IN_CORE else slow(name) for name in CASES]


def tracked(folder, method, **options):
    asked = data(options.get("net", "mlp"), QUERIES, 1)
    methods = method if isinstance(method, dict) else [method]
    return fitted(folder, methods=methods, queries=asked, **{"max_cost": 1e9, **options})


def unrolled(fit):
    with sdpa_kernel(SDPBackend.MATH):
        return oracles_dynamic.influence(fit.run, fit.query_losses, N)


def unrolled_fast(fit):
    with sdpa_kernel(SDPBackend.MATH):
        return fast_influence(fit.run, fit.query_losses, N)


def of(fit):
    return fit.influence.scores["HyDRA"].values


@pytest.mark.parametrize("case", ALL)
def test_with_the_hessian_it_is_autograd_through_the_whole_fit(case, tmp_path):
    fit = tracked(tmp_path, HyDRA(mode="during_fit"), **CASES[case])
    assert_scores(of(fit), unrolled(fit), 1e-9)


@pytest.mark.parametrize("case", ALL)
def test_without_it_is_its_own_recursion(case, tmp_path):
    fit = tracked(tmp_path, HyDRA(mode="during_fit", hessian=False), **CASES[case])
    expected = unrolled_fast(fit)
    assert_scores(of(fit), expected, 1e-9)
    assert float((expected - unrolled(fit)).abs().max()) > 1e-3 * float(expected.abs().max())  # another number


def test_it_is_the_finite_difference_in_an_examples_weight(tmp_path):
    fit, h = tracked(tmp_path, HyDRA(mode="during_fit"), groups=MOMENTUM), 1e-4
    for i in (0, 3, 7):
        up, down = torch.ones(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
        up[i], down[i] = 1 + h, 1 - h
        change = [oracles_dynamic.losses_at(fit.run, fit.query_losses, w) for w in (up, down)]
        torch.testing.assert_close(of(fit)[:, i], -(change[0] - change[1]) / (2 * h), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("hessian", [True, False])
def test_an_example_that_was_never_drawn_has_no_influence(hessian, tmp_path, monkeypatch):
    monkeypatch.setitem(QUIET, "limit_train_batches", 2)
    fit = tracked(tmp_path, HyDRA(mode="during_fit", hessian=hessian), epochs=1)
    seen = sorted(i for ids in fit.module.seen for i in ids)
    assert len(seen) == 8
    missing = [i for i in range(N) if i not in seen]
    assert not of(fit)[:, missing].any()
    assert bool((of(fit)[:, seen] != 0).all())


@pytest.mark.parametrize("hessian", [True, slow(False)])
@pytest.mark.parametrize("kind", [slow("SGD"), "AdamW"])
def test_some_examples_have_the_scores_that_they_have_among_all(kind, hessian, tmp_path):
    some = HyDRA(mode="during_fit", hessian=hessian, examples=(7, 2, 5))
    options = {"kind": kind, "lr": 0.01, "groups": ({"weight_decay": 0.1},)}
    fit = tracked(tmp_path, some, **options, top_k=2)
    expected = (unrolled if hessian else unrolled_fast)(fit)
    scores = fit.influence.attributor.score(some, fit.queries)
    assert scores.train_ids.tolist() == [2, 5, 7]
    assert_scores(scores.values, expected[:, [2, 5, 7]], 1e-9)
    best = expected[:, [2, 5, 7]].topk(2)
    found = fit.influence.scores["HyDRA"].proponents(2)
    assert torch.equal(found.train_ids, torch.tensor([2, 5, 7])[best.indices])
    assert_scores(found.scores, best.values, 1e-9)
    torch.testing.assert_close(
        fit.influence.attributor.group(some, [7, 2], fit.queries), expected[:, [2, 7]].sum(1), rtol=1e-9, atol=1e-12
    )
    with pytest.raises(ValueError, match=r"Expected `ids` that HyDRA.* has scores for, got \[3\]"):
        fit.influence.attributor.group(some, [3, 7], fit.queries)


@pytest.mark.parametrize("options", [{}, slow({"kind": "AdamW", "lr": 0.01, "divisor": 2})], ids=["sgd", "adamw"])
@pytest.mark.parametrize("hessian", [True, False])
def test_in_files_the_numbers_are_the_same(hessian, options, tmp_path):
    small, large = (HyDRA(mode="during_fit", hessian=hessian, memory=size) for size in (1, 2**30))
    fit = tracked(tmp_path, {"small": small, "large": large}, groups=({"weight_decay": 0.1},), **options)
    torch.testing.assert_close(
        fit.influence.scores["small"].values, fit.influence.scores["large"].values, rtol=1e-12, atol=1e-14
    )
    assert_scores(fit.influence.scores["small"].values, (unrolled if hessian else unrolled_fast)(fit), 1e-9)
    assert not list(tmp_path.rglob(".work-*"))


@pytest.mark.parametrize("hessian", [True, slow(False)])
def test_batch_statistics_with_losses_of_the_joint_batch(hessian, tmp_path):
    fit = tracked(tmp_path, HyDRA(mode="during_fit", hessian=hessian), net="batchnorm", loss=joint, divisor=2)
    final = {name: b.clone() for name, b in fit.module.net.named_buffers()}

    def at_the_end(module, params):  # with the statistics of the fit, which count as constants
        return fit.query_losses(module, params | final)

    influence = fast_influence if not hessian else oracles_dynamic.influence
    assert_scores(of(fit), influence(fit.run, at_the_end, N), 1e-9)


def test_batch_statistics_alone_are_refused(tmp_path):
    with pytest.warns(UserWarning, match=r"got `net\.1` \(BatchNorm1d\) in train mode.*Pass `loss=`"):
        fit = tracked(tmp_path, HyDRA(mode="during_fit"), net="batchnorm")
    assert fit.trainer.global_step == 6
    with pytest.raises(KeyError, match="did not run"):
        of(fit)


def test_a_fit_that_was_not_watched_cannot_be_asked(tmp_path):
    fit = fitted(tmp_path)
    with pytest.raises(MissingEvidence, match=r"`HyDRA.during_fit\(...\)` with these .* or use `HyDRA\(\)`"):
        fit.influence.attributor.score(HyDRA(mode="during_fit"), fit.queries)


def test_it_is_on_disk(tmp_path):
    method = HyDRA(mode="during_fit", hessian=False)
    fit = tracked(tmp_path, method, groups=MOMENTUM)
    offline = Attributor(fit.module, fit.data, fit.influence.trajectory)
    assert_scores(offline.score(method, data("mlp", QUERIES, 1)).values, unrolled_fast(fit), 1e-9)
    other = data("mlp", 3, 5)
    found = offline.score(method, other, aggregate="mean").values
    torch.testing.assert_close(found, offline.score(method, other).values.mean(0, keepdim=True))


class Small:
    """A disk that is nearly full."""

    free = 1000


def test_plans_that_cannot_fit_are_refused_before_the_fit(tmp_path, monkeypatch):
    with pytest.raises(MisconfigurationException, match=r"at most `max_cost=0\.01` times.*`examples=`.*`HyDRA\(\)`"):
        tracked(tmp_path, HyDRA(mode="during_fit"), max_cost=0.01)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Small)
    with pytest.raises(MisconfigurationException, match=r"hypergradients of 11 examples to fit the 0 MiB.*hessian=Fal"):
        tracked(tmp_path, HyDRA(mode="during_fit"))
    with pytest.raises(MisconfigurationException, match=r"factors of 24 visits to fit the 0 MiB.*fewer epochs"):
        tracked(tmp_path, HyDRA(mode="during_fit", hessian=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": "*weight"}, "Leave `parameters` out"),
        ({"method": HyDRA(mode="during_fit", examples=(3, 99))}, r"Expected `examples` to be ids below 11, got \[99\]"),
        ({"method": HyDRA(mode="during_fit", examples=())}, "got none"),
        ({"kind": "Adam", "groups": ({"amsgrad": True},)}, "`amsgrad=False`"),
        ({"kind": "RMSprop"}, "got `RMSprop`. Write a subclass"),
        ({"loss": lambda module, batch: 2 * joint(module, batch)}, None),
    ],
)
def test_what_cannot_be_followed_is_refused(options, message, tmp_path):
    options = dict(options)
    method = options.pop("method", HyDRA(mode="during_fit"))
    if message is None:
        with pytest.warns(UserWarning, match="is no longer tracked.*Let `loss=` return each"):
            tracked(tmp_path, method, **options)
        return
    with pytest.raises(MisconfigurationException, match=message):
        tracked(tmp_path, method, **options)


@pytest.mark.parametrize(("settings", "name"), [({"mode": "later"}, "mode"), ({"hessian": 2}, "hessian")])
def test_other_settings_are_refused(settings, name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be one of"):
        HyDRA(**settings)


class Meddling(Callback):
    """Does something to a fit after `Influence` has seen the batch."""

    def __init__(self, how):
        self.how = how

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.how == "draws":
            torch.rand(1)
        if self.how == "writes":
            batch[0].mul_(1.5)

    def on_after_backward(self, trainer, pl_module):
        if self.how == "changes gradients":
            next(pl_module.parameters()).grad.mul_(2.0)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.how == "changes them late":
            next(pl_module.parameters()).grad.mul_(2.0)


@pytest.mark.parametrize("how", ["draws", "writes", "changes gradients", "changes them late"])
def test_who_meddles_behind_our_back_ends_the_tracking(how, tmp_path, monkeypatch):
    trainer = pl.Trainer
    monkeypatch.setattr(
        "replay.runs.pl.Trainer",
        lambda callbacks, **options: trainer(callbacks=[*callbacks, Meddling(how)], **options),
    )
    with pytest.warns(UserWarning, match="'HyDRA' is no longer tracked; the fit goes on. Untrackable: "):
        fit = tracked(tmp_path, HyDRA(mode="during_fit"), net="dropout")
    with pytest.raises(KeyError, match="did not run: Untrackable"):
        of(fit)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("divisor", [1, slow(3)])
@pytest.mark.parametrize("hessian", [True, False])
def test_batches_without_a_loss_count_for_nothing(hessian, divisor, tmp_path):
    """The last one of an epoch, which has three examples: alone in its step, or after others."""
    last = data("mlp", N, 0).tensors[0][8:]

    def step(net, x, y):
        return None if torch.equal(x, last) else F.cross_entropy(net(x), y)

    options = {"divisor": divisor, "groups": ({"momentum": 0.9},), "loader": {"shuffle": False}}
    fit = tracked(tmp_path, HyDRA(mode="during_fit", hessian=hessian), step=step, **options)
    with_loss = [[batch for batch in window if len(batch[0]) == 4] for window in fit.run.windows]
    assert with_loss != fit.run.windows
    made = [(window, rates) for window, rates in zip(with_loss, fit.run.rates, strict=True) if window]
    fit.run.windows, fit.run.rates = [window for window, _ in made], [rates for _, rates in made]
    assert_scores(of(fit), unrolled(fit) if hessian else unrolled_fast(fit), 1e-9)


class Freezing(Callback):
    """Freezes the first layer, or lets it go, when so many steps were made."""

    def __init__(self, at, trains):
        self.at, self.trains = at, trains

    def on_fit_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(not self.trains)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            pl_module.net[0].requires_grad_(self.trains)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("hessian", [True, False])
def test_parameters_frozen_or_unfrozen_on_the_way_end_the_tracking(hessian, trains, tmp_path, monkeypatch):
    """After the fourth step, behind which no step is looked at closely before the eighth."""
    trainer = pl.Trainer
    monkeypatch.setattr(
        "replay.runs.pl.Trainer",
        lambda callbacks, **options: trainer(callbacks=[Freezing(4, trains), *callbacks], **options),
    )
    told = f"got `net.0.bias` and 1 more {'un' if trains else ''}frozen during the fit. Use `HyDRA\\(\\)`"
    with pytest.warns(UserWarning, match=told):
        fit = tracked(tmp_path, HyDRA(mode="during_fit", hessian=hessian))
    with pytest.raises(KeyError, match="during the fit"):
        of(fit)
