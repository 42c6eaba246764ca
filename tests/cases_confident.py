"""Losses of examples of which the model is certain, in float32: the scores are those of float64.

Brute force in float64 has five digits up to a gap of 25 between the logits; see ``test_certain.py`` for larger ones.
"""

import torch
from case import Case, Items, Step, drawn
from torch import nn
from torch.nn import functional as F

CLASSES = 3


def certain(dim):
    """A network whose outputs are about the first three of its inputs, or the first alone."""
    g = drawn(11)
    net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, dim))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(torch.eye(*layer.weight.shape) + 0.02 * torch.randn(layer.weight.shape, generator=g))
            layer.bias.zero_()
        if dim == 1:  # a sign for two classes
            net[2].weight[0, 1] = -1.0
    return net


def gaps(least, most, n, seed, classes=CLASSES, wrong=0):
    """Inputs whose own class has a logit larger than all others by ``least`` to ``most``; the last ones have others."""

    def make():
        g = drawn(seed)
        y = torch.arange(n) % classes
        x = 0.5 * torch.rand(n, 5, generator=g)
        x[torch.arange(n), y] += torch.linspace(least, most, n)
        y[n - wrong :] = (y[n - wrong :] + 1) % classes
        return Items(list(zip(x, y, strict=True)))

    return make


def confident(name, loss, dim=CLASSES, most=25.0, module=Step, **options):
    classes = max(2, dim)
    return Case(
        name,
        lambda: module(certain(dim), loss),
        train=gaps(0.5, 20.0, 9, 1, classes, wrong=2),
        queries=gaps(15.0, most, 7, 2, classes),
        dtype=torch.float32,
        double_truth=True,
        tolerance=3e-5,
        **options,
    )


def one_hot(out, y):
    return F.one_hot(y, CLASSES).to(out)


def positive(out, y):
    return (y == 0).to(out)


def by_class(out):
    return torch.tensor([0.2, 1.0, 3.0]).to(out)


def of_probability(out, y):
    return -out.softmax(1).gather(1, y[:, None]).log().mean()


def focal(out, y):
    p = out.softmax(1).gather(1, y[:, None])
    return (-(1 - p) * p.log()).mean()


def picked_first(out, y):
    own = out.gather(1, y[:, None])[:, 0]
    return (out.logsumexp(1) - own).mean()


def by_softplus(out, y):
    return (F.softplus(out[:, 0]) - positive(out, y) * out[:, 0]).mean()


def penalised(out, y):
    return F.cross_entropy(out, y) + 0.01 * F.binary_cross_entropy(out.sigmoid(), one_hot(out, y))


class WithProbabilities(Step):
    """Its network ends in probabilities, and a penalty uses the weights after the loss."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        p = self.net(x).softmax(1)
        return F.nll_loss(p.log(), y) + 1e-30 * self.net[0].weight.square().sum()


class Transposed(Step):
    """A last layer written as a product with a transposed weight."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net[1](self.net[0](x)) @ self.net[2].weight.T + self.net[2].bias
        return self.loss(out, y)


class Tempered(Step):
    """A parameter divides the logits."""

    def __init__(self, net, loss):
        super().__init__(net, loss)
        self.temperature = nn.Parameter(torch.tensor([1.1]))

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]) / self.temperature, batch[1])


class Twice(Step):
    """Its network sees each input and a mirrored one."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.net(x) + 0.1 * self.net(0.9 * x), y)


def weighted_binary(out, y):
    return F.binary_cross_entropy_with_logits(
        out, one_hot(out, y), weight=by_class(out), pos_weight=by_class(out) + 1, reduction="mean"
    )


CONFIDENT = [
    confident("certain: cross-entropy", F.cross_entropy),
    confident("certain: cross-entropy, after a fit", F.cross_entropy, fit=True),
    confident("certain: cross-entropy, summed", lambda out, y: F.cross_entropy(out, y, reduction="sum")),
    confident("certain: nn.CrossEntropyLoss", nn.CrossEntropyLoss()),
    confident("certain: cross-entropy of probabilities", lambda out, y: F.cross_entropy(out, one_hot(out, y))),
    confident("certain: label smoothing", lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1)),
    confident("certain: nll of log_softmax", lambda out, y: F.nll_loss(F.log_softmax(out, 1), y)),
    confident("certain: log_softmax by hand", lambda out, y: -(out.log_softmax(-1) * one_hot(out, y)).sum(1).mean()),
    confident("certain: kl_div", lambda o, y: F.kl_div(o.log_softmax(1), one_hot(o, y), reduction="batchmean")),
    confident(
        "certain: binary with logits", lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], positive(o, y)), 1
    ),
    confident("certain: binary with logits, weighted", weighted_binary),
    confident("certain: multilabel_soft_margin", lambda o, y: F.multilabel_soft_margin_loss(o, one_hot(o, y))),
    confident("certain: cross-entropy, transposed weight", F.cross_entropy, module=Transposed),
    confident("certain: cross-entropy with a temperature", F.cross_entropy, module=Tempered),
    confident("certain: sigmoid and BCE", lambda o, y: F.binary_cross_entropy(o[:, 0].sigmoid(), positive(o, y)), 1),
    confident("certain: nn.BCELoss of three", lambda o, y: nn.BCELoss()(torch.sigmoid(o), one_hot(o, y))),
    confident("certain: logarithm of a probability", of_probability),
    confident("certain: focal loss", focal, most=20.0),
    confident("certain: logsumexp by hand", picked_first),
    confident("certain: softplus by hand", by_softplus, 1, most=18.0),
    confident("certain: squared error of a sigmoid", lambda o, y: F.mse_loss(o.sigmoid(), one_hot(o, y)), most=20.0),
    confident("certain: two losses", penalised),
    confident("certain: probabilities and a penalty", None, module=WithProbabilities),
    confident("certain: probabilities, transposed weight", of_probability, module=Transposed),
    confident("certain: probabilities with a temperature", of_probability, module=Tempered),
    confident("certain: probabilities, a network used twice", of_probability, module=Twice, most=20.0),
]
