"""Scores in units of loss that no change of a loss can have are noted, and have no unit."""

from dataclasses import dataclass, replace

import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from test_attributor import QUERIES, TRAIN, Net
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributor, GradientDot, Influence, KNNShapley, Trajectory
from lightning_influence.attribution import driver
from lightning_influence.attribution.magnitude import FLAG
from lightning_influence.processes import Processes

NOTE = "times as large as the loss of their example or any that the fit recorded"


@dataclass(frozen=True)
class Times(GradientDot):
    """Gradient products times a number, in a unit."""

    factor: float = 1.0
    called: str = "loss"

    def product(self, stage, query, block):
        return super().product(stage, query, block) * self.factor

    def product_with_itself(self, stage, block):
        return super().product_with_itself(stage, block) * self.factor

    def unit(self, setting):
        return self.called


class Numbers(Net):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1].double())


def fitted(net, folder):
    influence = Influence(dirpath=folder)
    pl.Trainer(**QUIET, max_epochs=1, callbacks=[influence]).fit(net, DataLoader(TRAIN, 5, shuffle=True))
    return net, Trajectory.load(influence.run_dir)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return fitted(Net(), tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("factor", "called", "absurd"), [(1, "loss", False), (1e6, "loss", True), (1e6, "x", False)])
def test_scores_beyond_all_losses_have_no_unit(run, factor, called, absurd, top_k):
    method, attributor = Times(factor=factor, called=called), Attributor(run[0], TRAIN, run[1])
    for found in (attributor.score(method, QUERIES, top_k=top_k), attributor.self_influence(method)):
        assert any(NOTE in note for note in found.notes) == absurd
        assert found.units == ("arbitrary" if absurd else called)
        assert (FLAG in found.diagnostics) == absurd


def test_the_number_is_how_many_times_the_loss_the_scores_are(run):
    found = Attributor(run[0], TRAIN, run[1]).score(Times(factor=1e6), QUERIES)
    x, y = QUERIES.tensors
    bounds = [torch.full((len(y),), max(value for *_, value in run[1].fit_data.losses.values)).double()]
    for checkpoint in (run[1].checkpoints[0], run[1].checkpoints[-1]):
        w = checkpoint.load().parameters
        hidden = torch.tanh(x @ w["net.0.weight"].T + w["net.0.bias"])
        z = hidden @ w["net.2.weight"].T + w["net.2.bias"]
        bounds.append(F.cross_entropy(z, y, reduction="none"))
    expected = (found.values.double().abs().amax(1) / torch.stack(bounds).amax(0)).max()
    assert found.diagnostics[FLAG] == pytest.approx(float(expected), rel=1e-6)


def test_a_query_whose_own_loss_is_as_large_may_have_such_scores(tmp_path):
    torch.manual_seed(0)
    net, trajectory = fitted(Numbers(), tmp_path)
    far = TensorDataset(QUERIES.tensors[0], torch.where(torch.arange(len(QUERIES)) == 3, 10**6, QUERIES.tensors[1]))
    attributor, largest = Attributor(net, TRAIN, trajectory), max(v for *_, v in trajectory.fit_data.losses.values)
    found = attributor.score(Times(), far)
    assert float(found.values[3].abs().max()) > 1000 * largest
    assert found.units == "loss"
    assert attributor.score(Times(factor=1e9), far).units == "arbitrary"


def test_nothing_is_said_where_the_fit_recorded_no_losses(run):
    bare = replace(run[1], fit_data=replace(run[1].fit_data, losses=None))
    assert Attributor(run[0], TRAIN, bare).score(Times(factor=1e6), QUERIES).units == "loss"


class First(Processes):
    """The first of two processes; the scores of the other are as many times as large."""

    def __init__(self, times):
        super().__init__(0, 2)
        self.times = times

    def gathered(self, value):
        return [value, value * self.times if isinstance(value, torch.Tensor) and value.ndim == 1 else value]


@pytest.mark.parametrize("method", [Times(), KNNShapley()], ids=["examples divided", "queries divided"])
def test_what_is_noted_follows_from_the_scores_of_all_processes(run, monkeypatch, method):
    attributor, seen = Attributor(run[0], TRAIN, run[1]), []
    monkeypatch.setattr(driver, "note_impossible", lambda *arguments: seen.append(arguments[-1]))
    monkeypatch.setattr(driver, "_note_vanished", lambda *arguments: seen.append(arguments[-1]))
    whole = attributor.score(method, QUERIES).values.abs()
    attributor.processes = First(1e9)
    attributor.group(method, [1, 2], QUERIES)
    if isinstance(method, Times):
        whole = whole[:, : len(TRAIN) // 2]
    else:
        whole[len(QUERIES) // 2 :] = 0  # those of the other
    torch.testing.assert_close(seen[3], whole.amax(1) * 1e9)
    assert seen[2] == int((whole.amax(1) == 0).sum())
