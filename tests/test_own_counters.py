"""Values that the step changes itself: refused where the loss depends on them, and of no account where it does not."""

import oracles
import pytest
import pytorch_lightning as pl
import torch
from case import Step, both, mlp
from cases_losses import each
from fits import QUIET
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot, Influence, TracInCP, Trajectory

BATCH = 4


class Counting(Step):
    """Its loss is another one in some calls."""

    def __init__(self):
        super().__init__(mlp())
        self.n, self.flip, self.counts, self.mean, self.seen = 0, False, {"calls": 0}, 0.0, []
        self.register_buffer("calls", torch.tensor(0))

    def training_step(self, batch, batch_idx):
        self.n += 1
        self.flip = not self.flip
        self.counts["calls"] += 1
        self.calls += 1
        loss = self.loss(self(batch[0]), batch[1])
        self.mean = 0.9 * self.mean + 0.1 * loss.item()
        self.seen.append(loss.item())
        return loss * self.factor()

    def factor(self):
        return 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ByCounter(Counting):
    def factor(self):
        return 2.0 if self.n % 2 else 1.0


class Rarely(Counting):
    def factor(self):
        return 2.0 if self.n % 7 == 0 else 1.0


class BySwitch(Counting):
    def factor(self):
        return 2.0 if self.flip else 1.0


class ByDict(Counting):
    def factor(self):
        return 2.0 if self.counts["calls"] % 2 else 1.0


class ByBuffer(Counting):
    def factor(self):
        return 2.0 if int(self.calls) % 2 else 1.0


class ByMean(Counting):
    """Its factor is the average over earlier batches."""

    def training_step(self, batch, batch_idx):
        self.before = self.mean
        return super().training_step(batch, batch_idx)

    def factor(self):
        return 1.0 + self.before


class WarmedUp(Counting):
    """Its factor has grown to 1 long before the last epoch."""

    def factor(self):
        return min(1.0, self.n / 3)


def fitted(kind, folder):
    torch.manual_seed(0)
    data, module, influence = both(5, n=16), kind().double(), Influence(dirpath=folder)
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[influence])
    loader = DataLoader(data["train"](), BATCH)
    trainer.fit(module, loader)
    return module, loader, influence, data["queries"]()


CHANGING = {ByCounter: "`n`", Rarely: "`n`", BySwitch: "`flip`", ByDict: "`counts['calls']`", ByBuffer: "`calls`"}


@pytest.mark.parametrize("kind", CHANGING)
def test_a_loss_that_follows_a_counter_of_the_step_is_refused(kind, tmp_path):
    module, loader, influence, queries = fitted(kind, tmp_path)
    says = f"training_step` counts itself.*{CHANGING[kind][1:-1].split('[')[0]}.*batch_idx.*loss="
    before = dict(module.__dict__), module.calls.clone(), dict(module.counts), list(module.seen)
    for method in (TracInCP(), GradientDot()):
        with pytest.raises(ValueError, match=says):
            influence.attributor.score(method, queries)
    assert (dict(module.__dict__), module.calls, module.counts, module.seen) == before
    if kind is not Rarely:  # a module made anew counts from 0, as far as a few calls
        later = Attributor(kind().double(), loader, Trajectory.load(tmp_path))
        with pytest.raises(ValueError, match=says):
            later.score(TracInCP(), queries)
    stated = Attributor(module, loader, influence.trajectory, loss=each(F.cross_entropy))
    assert stated.score(TracInCP(), queries).values.isfinite().all()


@pytest.mark.parametrize("kind", [Counting, WarmedUp])
def test_counters_that_the_loss_does_not_follow_are_of_no_account(kind, tmp_path):
    module, loader, influence, queries = fitted(kind, tmp_path)
    plain = Attributor(module, loader, influence.trajectory, loss=each(F.cross_entropy))
    scores = influence.attributor.score(GradientDot(), queries)
    oracles.assert_scores(scores.values, plain.score(GradientDot(), queries).values, 1e-10)
    assert not any("calls" in note or "each call" in note for note in scores.notes)


def test_a_loss_that_follows_an_average_has_a_note(tmp_path):
    _, _, influence, queries = fitted(ByMean, tmp_path)
    notes = influence.attributor.score(GradientDot(), queries).notes
    assert any("depends on `mean`" in note for note in notes)
