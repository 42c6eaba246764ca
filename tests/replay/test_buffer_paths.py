"""Steps that move a buffer which the loss reads: derivatives of a replay against refits by hand, or a refusal."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from oracles import assert_scores
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import HyDRA, Influence, MissingEvidence, TracIn, TracInCP
from lightning_influence.replay.replay import DriftError

N, SIZE, EPOCHS, RATE, MOVE = 12, 4, 3, 0.1, 1e-5
g = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 3, generator=g, dtype=torch.float64), torch.randint(2, (N,), generator=g)
QUERIES = TensorDataset(torch.randn(3, 3, generator=g, dtype=torch.float64), torch.randint(2, (3,), generator=g))


class Centred(pl.LightningModule):
    """Subtracts a running centre; ``kind`` says what moves it and which loss reads it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        body = nn.Linear(3, 4)
        if kind == "spectral norm":
            body = nn.utils.parametrizations.spectral_norm(body)
        self.body = nn.Sequential(body, nn.BatchNorm1d(4) if kind == "batch norm" else nn.Tanh())
        self.head = nn.Linear(4, 2)
        self.double()
        for name in ("centre", "before", "total"):
            self.register_buffer(name, torch.zeros(4, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(()))

    def features(self, x):
        h = self.body(x)
        if self.kind in ("weights", "data", "constant", "silently") or (self.kind == "eval" and not self.training):
            return h - self.centre
        if self.kind == "two links":
            return h - self.before
        if self.kind == "every third" and self.trainer.global_step % 3 == 2:
            return h - self.centre
        return h

    def losses(self, x, y):
        return F.cross_entropy(self.head(self.features(x)), y, reduction="none")

    def move(self, x):
        with torch.no_grad():
            self.count += 1
            self.total += self.body(x).sum(0)
            self.before.copy_(self.centre)
            centre = self.centre.data if self.kind == "silently" else self.centre
            added = {"data": x.mean(), "constant": 1.0, "silently": 1.0}.get(self.kind, self.body(x).mean(0))
            centre.mul_(0.9).add_(0.1 * added)

    def training_step(self, batch, batch_idx):
        loss = self.losses(*batch).mean()
        self.move(batch[0])
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def each(module, batch):
    return module.losses(*batch)


def fitted(kind, folder, **options):
    """The module before the fit, and the callback after it."""
    torch.manual_seed(1)
    module = Centred(kind)
    start = copy.deepcopy(module)
    influence = Influence(dirpath=folder, **({"loss": each if kind == "batch norm" else None} | options))
    trainer = pl.Trainer(**QUIET, max_epochs=EPOCHS, callbacks=[influence])
    trainer.fit(module, DataLoader(TensorDataset(X, Y), SIZE))
    return start, influence


def derivatives(start):
    """[query, train]: minus the change of the final losses by the weight of an example, by finite differences."""

    def final(i, by):
        module = copy.deepcopy(start)
        optimizer = module.configure_optimizers()
        weights = torch.ones(N, dtype=torch.float64)
        weights[i] += by
        for first in [*range(0, N, SIZE)] * EPOCHS:
            part = slice(first, first + SIZE)
            optimizer.zero_grad()
            (module.losses(X[part], Y[part]) * weights[part]).mean().backward()
            module.move(X[part])
            optimizer.step()
        with torch.no_grad():
            return module.losses(*QUERIES.tensors)

    return -torch.stack([(final(i, MOVE) - final(i, -MOVE)) / (2 * MOVE) for i in range(N)], 1)


@pytest.mark.parametrize("kind", ["data", "constant", "silently", "unread"])
def test_a_buffer_that_moves_without_the_weights_or_unread_is_followed(kind, tmp_path):
    start, influence = fitted(kind, tmp_path, methods=[HyDRA.during_fit()], queries=QUERIES, max_cost=1e9)
    expected = derivatives(start)
    for _ in range(3):  # later walks take other snapshots of the module
        assert_scores(influence.attributor.score(HyDRA(checks=0), QUERIES).values, expected, 1e-7)
    assert_scores(influence.scores["HyDRA"].values, expected, 1e-7)


@pytest.mark.parametrize("kind", ["weights", "two links", "eval", "every third", "spectral norm"])
def test_a_buffer_that_carries_the_weights_to_later_losses_is_named(kind, tmp_path):
    name = {"two links": "before", "spectral norm": "_u"}.get(kind, "centre")
    with pytest.warns(UserWarning, match=rf"{name}`, a buffer"):
        _, influence = fitted(kind, tmp_path, methods=[HyDRA.during_fit()], queries=QUERIES, max_cost=1e9)
    with pytest.raises(ValueError, match=rf"got `.*{name}`, a buffer .*Use `TracInCP\(\)`"):
        influence.attributor.score(HyDRA(checks=0), QUERIES)
    with pytest.raises(MissingEvidence, match="follows a fit while it runs"):
        influence.attributor.score(HyDRA.during_fit(), QUERIES)
    for method in (TracIn(), TracInCP(), HyDRA(hessian=False, checks=0)):
        assert influence.attributor.score(method, QUERIES).values.isfinite().all()


def test_without_the_path_the_derivative_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_influence.replay.buffer_paths.BufferPaths.check", lambda *args: None)
    start, influence = fitted("weights", tmp_path)
    expected = derivatives(start)
    found = influence.attributor.score(HyDRA(checks=0), QUERIES).values
    assert (found - expected).abs().max() > 0.01 * expected.abs().max()


def test_running_statistics_are_noted(tmp_path):
    _, influence = fitted("batch norm", tmp_path, methods=[HyDRA.during_fit()], queries=QUERIES, max_cost=1e9)
    for method in (HyDRA(checks=0), HyDRA.during_fit()):
        notes = influence.attributor.score(method, QUERIES).notes
        assert any("running statistics of `body.1` are taken as they were" in note for note in notes)


def test_the_fit_is_the_same_with_tracking(tmp_path):
    after = []
    for k, methods in enumerate(([], [HyDRA.during_fit()])):
        _, influence = fitted("data", tmp_path / str(k), methods=methods, queries=QUERIES, max_cost=1e9)
        after.append(influence.attributor.module.state_dict())
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.parametrize("method", [HyDRA(checks=0), TracIn()])
def test_a_buffer_that_only_the_fit_moves_is_named(method, tmp_path):
    _, influence = fitted("batch norm", tmp_path)  # its `loss=` moves nothing
    assert influence.attributor.score(method, QUERIES).values.isfinite().all()  # and does not read the centre either
    _, influence = fitted("weights", tmp_path, loss=each)
    with pytest.raises(DriftError, match=r"got `centre`, which only the fit moved.*leave `loss=` out"):
        influence.attributor.score(method, QUERIES)


def silent_teacher(folder, methods):
    """The weights after a fit whose step moves a frozen layer by its `data`."""

    class Teacher(Centred):
        def __init__(self):
            super().__init__("data")
            self.teacher = nn.Linear(3, 4).double().requires_grad_(False)

        def training_step(self, batch, batch_idx):
            loss = (
                super().training_step(batch, batch_idx) + (self.teacher(batch[0]) - self.body(batch[0])).pow(2).mean()
            )
            self.teacher.weight.data.mul_(0.9)
            return loss

    torch.manual_seed(1)
    module = Teacher()
    trainer = pl.Trainer(**QUIET, max_epochs=EPOCHS, callbacks=[Influence(methods, queries=QUERIES, dirpath=folder)])
    trainer.fit(module, DataLoader(TensorDataset(X, Y), SIZE))
    return module.state_dict()


def test_tracking_leaves_silent_writes_of_parameters_to_the_fit(tmp_path):
    plain, tracked = silent_teacher(tmp_path / "0", []), silent_teacher(tmp_path / "1", [HyDRA.during_fit()])
    assert all(torch.equal(plain[name], tracked[name]) for name in plain)
