"""A loss that is another one in training mode than in eval mode is noted; random and ordinary layers are not."""

import pytest
import torch
from case import Step
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_influence import Attributor, GradientDot


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


class Smoothed(Step):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1 * self.training)


class ByClass(Step):
    def training_step(self, batch, batch_idx):
        weight = torch.tensor([1.0, 2.0, 5.0]).double() if self.training else None
        return F.cross_entropy(self(batch[0]), batch[1], weight)


class ByExample(Step):
    def training_step(self, batch, batch_idx):
        each = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return (each * (1 + 5.0 * (batch[1] > 0)) if self.training else each).mean()


class HookOnActivations(Step):
    def forward(self, x):
        h = self.net[0](x)
        if self.training:
            h.register_hook(lambda g: g * 2)
        return self.net[1:](h)


class Functional(Step):
    def forward(self, x):
        return self.net(F.dropout(x, 0.5, self.training))


class Logging(Step):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.training:
            self.log("loss", loss)
        return loss


class NoisyBatches(Step):
    def on_after_batch_transfer(self, batch, index):
        x, y = batch
        return [x + torch.randn_like(x) if self.training else x, y]


class Fails(Step):
    def training_step(self, batch, batch_idx):
        if self.training:
            raise RuntimeError
        return super().training_step(batch, batch_idx)


class Depth(nn.Module):
    """Stochastic depth, which draws in training only."""

    def forward(self, x):
        return x * (torch.rand(len(x), 1) > 0.5) if self.training else x


class Transformer(Step):
    def forward(self, x):
        return self.net(x[:, None]).squeeze(1)


def noted(module):
    generator = torch.Generator().manual_seed(0)
    train = TensorDataset(torch.randn(9, 4, generator=generator).double(), torch.arange(9) % 3)
    weights = {name: value.clone() for name, value in module.double().state_dict().items()}
    modes = [part.training for part in module.modules()]
    scores = Attributor(module, train).score(GradientDot(), train)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    return [note for note in scores.notes if "training mode" in note]


@pytest.mark.parametrize("kind", [Smoothed, ByClass, ByExample, HookOnActivations])
def test_a_loss_of_training_mode_is_noted(kind):
    (note,) = noted(kind(net()))
    assert "%" in note
    assert "`loss=`" in note


@pytest.mark.parametrize(
    "make",
    [
        lambda: Step(net()),
        lambda: Step(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))),
        lambda: Step(nn.Sequential(nn.Linear(4, 4), Depth(), nn.Linear(4, 3))),
        lambda: Step(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3))),
        lambda: Step(nn.Sequential(nn.RReLU(), nn.Linear(4, 3))),
        lambda: Transformer(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 3))),
        lambda: Functional(net()),
        lambda: Logging(net()),
        lambda: NoisyBatches(net()),
        lambda: Fails(net()),
    ],
)
def test_what_is_random_or_the_same_in_training_mode_is_not_noted(make):
    torch.manual_seed(0)
    assert not noted(make())


def test_the_way_out_has_no_note():
    generator = torch.Generator().manual_seed(0)
    train = TensorDataset(torch.randn(9, 4, generator=generator).double(), torch.arange(9) % 3)

    def loss(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none", label_smoothing=0.1)

    scores = Attributor(Smoothed(net()).double(), train, loss=loss).score(GradientDot(), train)
    assert not [note for note in scores.notes if "training mode" in note]
