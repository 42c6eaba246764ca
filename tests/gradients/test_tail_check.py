"""Where the part of a loss in float64 would change the gradients, the loss is computed in its own precision."""

import oracles
import pytest
import torch
from case import Items, Step, mlp

from lightning_influence import Attributor, GradientDot
from lightning_influence.module import loss_tail


def own(out, y):
    return -out.softmax(1).gather(1, y[:, None])[:, 0].log().mean()


class Broken(loss_tail._InDouble):
    """Loses half of the gradient."""

    def _once(self, value):
        found = super()._once(value)
        logits = isinstance(value, torch.Tensor) and value.dtype is torch.float32 and value.requires_grad
        return 0.5 * found + 0.5 * found.detach() if logits else found


@pytest.mark.parametrize("broken", [False, True])
def test_a_tail_without_the_gradient_is_not_used(broken, monkeypatch):
    if broken:
        monkeypatch.setattr(loss_tail, "_InDouble", Broken)
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    net = mlp()
    data = Items([(torch.randn(5, generator=g), torch.tensor(i % 3)) for i in range(6)])

    scores = Attributor(Step(net, own), data).score(GradientDot(), data).values
    rows = [torch.autograd.grad(own(net(x[None]), y[None]), list(net.parameters())) for x, y in data]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    oracles.assert_scores(scores, expected @ expected.T, 1e-5)
