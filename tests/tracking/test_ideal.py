"""TracInIdeal against losses measured by hand at every step, its sum, and what it refuses."""

import itertools

import pytest
import torch
from case import Step, both, mlp
from fits import fit
from oracles import assert_scores
from pytorch_lightning import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_influence import Attributor, Influence, MissingEvidence, TracIn, TracInCP, TracInIdeal
from lightning_influence.compat import MisconfigurationException

DATA = both(5, n=6)


class Adaptive(Step):
    """Adam, so that a step is no multiple of a gradient."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.03)


def module(kind=Step):
    torch.manual_seed(0)
    return kind(mlp()).double()


class ByHand(Callback):
    """The losses of the queries before and after every batch, by plain forward passes."""

    def __init__(self, queries, n_train):
        self.queries, self.total = queries, torch.zeros(len(queries), n_train, dtype=torch.float64)

    def losses(self, module):
        with torch.no_grad():
            return torch.stack([module.loss(module.net(x[None]), y[None]) for x, y in self.queries])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = self.losses(pl_module)
        ((self.example,),) = [[i for i, (x, _) in enumerate(DATA["train"]()) if torch.equal(x, batch[0][0])]]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.total[:, self.example] += self.before - self.losses(pl_module)


def watched(tmp_path, kind=Step, methods=None, batch_size=1, **options):
    influence = Influence(methods or [TracInIdeal()], queries=DATA["queries"](), dirpath=tmp_path, max_cost=1e9)
    by_hand = ByHand(DATA["queries"](), 6)
    model = module(kind)
    callbacks = [influence, by_hand] if batch_size == 1 else [influence]
    fit(model, DataLoader(DATA["train"](), batch_size, shuffle=True), *callbacks, **options)
    return model, influence, by_hand


class Unknown(Step):
    """An optimizer that no rule is known of: none is needed."""

    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", [Step, Adaptive, Unknown])
def test_scores_are_the_changes_of_losses_measured_by_hand(kind, tmp_path):
    model, influence, by_hand = watched(tmp_path, kind)
    found = influence.scores["TracInIdeal"].values
    torch.testing.assert_close(found, by_hand.total, rtol=1e-12, atol=1e-14)
    start = by_hand.losses(module(kind))
    torch.testing.assert_close(found.sum(1), start - by_hand.losses(model))  # they telescope


def test_an_example_that_was_not_drawn_has_no_influence(tmp_path):
    _, influence, by_hand = watched(tmp_path, limit_train_batches=3, max_epochs=1)
    seen = by_hand.total.any(0)
    assert int(seen.sum()) == 3
    assert not influence.scores["TracInIdeal"].values[:, ~seen].any()


def test_it_is_on_disk_for_the_same_queries_only(tmp_path):
    model, influence, by_hand = watched(tmp_path)
    offline = Attributor(model, DATA["train"](), influence.trajectory)
    torch.testing.assert_close(offline.score(TracInIdeal(), DATA["queries"]()).values, by_hand.total)
    mean = offline.score(TracInIdeal(), DATA["queries"](), aggregate="mean").values
    torch.testing.assert_close(mean, by_hand.total.mean(0, keepdim=True))
    with pytest.raises(MissingEvidence, match="scores those of `Influence\\(queries=\\)` only"):
        offline.score(TracInIdeal(), DATA["train"]())


def test_a_fit_that_was_not_watched_cannot_be_asked(tmp_path):
    _, influence, _ = watched(tmp_path, methods=[TracInCP()])
    with pytest.raises(MissingEvidence, match=r"got nothing: .*follows a fit while it runs.*or use `TracInCP"):
        influence.attributor.score(TracInIdeal(), DATA["queries"]())


def test_larger_batches_are_refused_before_the_fit(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"got `batch_size=2`.*use `TracIn\(\)`"):
        watched(tmp_path, batch_size=2)
    with pytest.raises(MisconfigurationException, match="`accumulate_grad_batches=2`"):
        watched(tmp_path, accumulate_grad_batches=2)


def test_queries_must_be_known(tmp_path):
    with pytest.raises(MisconfigurationException, match="Expected `queries` before the fit, got None"):
        fit(module(), DataLoader(DATA["train"](), 1), Influence([TracInIdeal()], dirpath=tmp_path))


class Pairs(torch.utils.data.BatchSampler):
    """Hides the batch size."""

    def __init__(self):
        self.batch_size = None

    def __iter__(self):
        return iter([[0], [1], [2, 3], [4]])

    def __len__(self):
        return 4


def test_a_larger_batch_on_the_way_ends_the_tracking_and_not_the_fit(tmp_path):
    influence = Influence([TracInIdeal()], queries=DATA["queries"](), dirpath=tmp_path, max_cost=1e9)
    model = module()
    with pytest.warns(UserWarning, match="'TracInIdeal' is no longer tracked; the fit goes on. .*had 2 examples"):
        trainer = fit(model, DataLoader(DATA["train"](), batch_sampler=Pairs()), influence)
    assert trainer.global_step == 8
    with pytest.raises(KeyError, match=r"'TracInIdeal' did not run: .*had 2 examples"):
        influence.scores["TracInIdeal"]


class FirstOrder(Callback):
    """TracIn at every step, by one backward pass for every query and training example: learning rate times product."""

    def __init__(self, queries, rate):
        self.queries, self.rate, self.total = queries, rate, torch.zeros(len(queries), 6, dtype=torch.float64)

    def gradient(self, module, x, y):
        loss = module.loss(module.net(x[None]), y[None])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        ((example,),) = [[i for i, (x, _) in enumerate(DATA["train"]()) if torch.equal(x, batch[0][0])]]
        mine = self.gradient(pl_module, batch[0][0], batch[1][0])
        asked = torch.stack([self.gradient(pl_module, x, y) for x, y in self.queries])
        self.total[:, example] += self.rate * asked @ mine


def gap(folder, rate):
    """Largest difference between TracInIdeal and TracIn at every step, and the largest score."""

    class Plain(Step):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=rate)

    torch.manual_seed(0)
    model, queries = Plain(mlp()).double(), DATA["queries"]()
    influence = Influence([TracInIdeal()], queries=queries, dirpath=folder, max_cost=1e9)
    first = FirstOrder(queries, rate)
    fit(model, DataLoader(DATA["train"](), 1, shuffle=True), influence, first, max_epochs=1)
    found = influence.scores["TracInIdeal"].values
    at_every_step = influence.attributor.score(TracIn(), queries).values
    assert_scores(at_every_step, first.total, 1e-10)
    return float((found - at_every_step).abs().max()), float(found.abs().max())


def test_tracin_at_every_step_is_its_first_order(tmp_path):
    """The error falls fourfold when the learning rate halves."""
    errors = [gap(tmp_path / str(k), 2e-3 / 2**k) for k in range(3)]
    for (error, size), (half, _) in itertools.pairwise(errors):
        assert error < 0.05 * size
        assert 3.8 < error / half < 4.2


def test_where_losses_are_affine_tracin_at_every_step_is_it_exactly(tmp_path):
    """I7."""
    model = Step(nn.Linear(5, 1, bias=False), lambda z, y: (z[:, 0] * (y + 1)).mean()).double()
    influence = Influence([TracInIdeal(), TracIn()], queries=DATA["queries"](), dirpath=tmp_path, max_cost=1e9)
    fit(model, DataLoader(DATA["train"](), 1, shuffle=True), influence, max_epochs=2)
    assert_scores(influence.scores["TracIn"].values, influence.scores["TracInIdeal"].values, 1e-12)
