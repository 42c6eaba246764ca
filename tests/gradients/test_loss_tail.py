"""The part of a loss that runs in float64 has the gradients of the loss: whatever the step does with the logits."""

import oracles
import pytest
import torch
from case import Items, Step, mlp
from torch.nn import functional as F

from lightning_influence import Attributor, GradientDot
from lightning_influence.module.loss_tail import find_tail


def own(out, y):
    """The logarithms of the probabilities of the targets."""
    return out.softmax(1).gather(1, y[:, None])[:, 0].log()


def without_gradient(out, y):
    with torch.no_grad():
        weight = 1 - out.softmax(1).gather(1, y[:, None])[:, 0]
    return -(weight * own(out, y)).mean()


def in_inference_mode(out, y):
    with torch.inference_mode():
        confidence = float(out.softmax(1).max())
    return -own(out, y).mean() + 0 * confidence


class LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        p = torch.softmax(x, 1)
        ctx.save_for_backward(p)
        return p.log()

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return g - p * g.sum(1, keepdim=True)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


def by_own_function(out, y):
    return F.nll_loss(LogSoftmax.apply(out), y) + out.square().sum(1).mean()


def reversed_beside(out, y):
    return F.cross_entropy(Reversed.apply(out), y) - 2 * own(out, y).mean()


def written_after_a_view(out, y):
    first = out[:, 0]
    out.mul_(2)
    return -own(out, y).mean() + first.square().mean()


def written_then_own_function(out, y):
    some = own(out, y).mean()
    out.mul_(2)
    return F.nll_loss(LogSoftmax.apply(out), y) - some


def written_through_a_view(out, y):
    out[:, 1:].clamp_(max=0.3)
    return -own(out, y).mean()


def copied_by_double(out, y):
    shifted = out.double()
    shifted -= 2 * shifted.detach().amax(1, keepdim=True)
    return -own(shifted, y).mean() + out.square().sum(1).mean()


def data_replaced(out, y):
    some = own(out, y).mean()
    out.data = out.data.clamp(max=0.2)
    return -own(out, y).mean() - some


LOSSES = (
    without_gradient,
    in_inference_mode,
    by_own_function,
    reversed_beside,
    written_after_a_view,
    written_then_own_function,
    written_through_a_view,
    copied_by_double,
    data_replaced,
)


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_are_those_of_autograd(loss):
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    net = mlp()
    data = Items([(torch.randn(5, generator=g), torch.tensor(i % 3)) for i in range(6)])
    rows = []
    for x, y in data:
        value = loss(net(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))]))
    expected = torch.stack(rows).double()
    scores = Attributor(Step(net, loss), data).score(GradientDot(), data).values
    oracles.assert_scores(scores, expected @ expected.T, 1e-5)


def test_numbers_made_of_targets_do_not_keep_it_from_float64():
    net = mlp()
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 1])

    def loss():
        return F.binary_cross_entropy(net(x)[:, 0].sigmoid(), (y == 0).float())

    assert find_tail(loss, net).is_used
