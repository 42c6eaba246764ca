"""What a model predicts, against the predictions of the same network called by hand."""

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from lightning_influence import Attributor
from lightning_influence.attribution.opinions import ModelOpinions

N = 7
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
CLASSES, NUMBERS = torch.arange(N) % 3, torch.arange(N) / 2
ONES = (torch.arange(N) % 2).float()


class Net(pl.LightningModule):
    def __init__(self, width, loss):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.loss = torch.nn.Linear(4, width), loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.layer(batch[0]), batch[1])


def by_hand(loss, labels):
    return F.nll_loss(loss.log_softmax(1), labels)


def aside(out, labels):
    return F.cross_entropy(out, labels) + F.cross_entropy(out[:, :2], labels * 0)


def of_others(out, labels):
    return F.cross_entropy(out, labels * 0)


def custom(out, labels):
    return out.logsumexp(1).mean() - out.gather(1, labels[:, None]).mean()


KINDS = {
    "classes": (3, F.cross_entropy, CLASSES),
    "log-probabilities": (3, by_hand, CLASSES),
    "two": (1, lambda out, y: F.binary_cross_entropy_with_logits(out[:, 0], y), ONES),
    "numbers": (1, lambda out, y: F.mse_loss(out.squeeze(1), y), NUMBERS),
    "two losses": (3, aside, CLASSES),
    "other labels": (3, of_others, CLASSES),
    "custom": (3, custom, CLASSES),
}


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_the_network(kind):
    width, loss, labels = KINDS[kind]
    net = Net(width, loss)
    attributor = Attributor(net, train=torch.utils.data.TensorDataset(X, labels), batch_size=4)
    found = ModelOpinions(attributor._session, attributor._train, None, None)("train", [5, 0, 1, 2, 6])
    with torch.no_grad():
        for i, opinion in found.items():
            out = net.layer(X[i])
            assert opinion.loss == pytest.approx(float(loss(out[None], labels[i : i + 1])), rel=1e-5)
            if kind in ("classes", "log-probabilities"):
                chances = out.softmax(0)
                best = int(chances.argmax())
                assert opinion[1:] == (best, pytest.approx(float(chances[best]), rel=1e-5), best == labels[i])
            elif kind == "two":
                one = float(out.sigmoid())
                assert opinion[1:] == (
                    int(one > 0.5),
                    pytest.approx(max(one, 1 - one), rel=1e-5),
                    (one > 0.5) == labels[i],
                )
            elif kind == "numbers":
                assert opinion[1:] == (pytest.approx(float(out), rel=1e-5), None, None)
            else:
                assert opinion[1:] == (None, None, None)


def test_the_models_own_weights_give_no_opinions_later_for_they_may_change():
    from lightning_influence import GradientDot

    data = torch.utils.data.TensorDataset(X, CLASSES)
    assert Attributor(Net(3, F.cross_entropy), train=data).score(GradientDot(), data).opinions is None
