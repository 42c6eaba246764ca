"""HyDRA by replay where the answer is known in closed form, or by training again."""

import pytest
import torch
from case import Items, Step
from fits import fit
from oracles import assert_scores
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Attributor, ExactGGN, HyDRA, Influence, InfluenceFunction, TracIn, Trajectory

RATE = 0.2


class Descent(Step):
    """Gradient descent on all examples at once, from given weights."""

    def __init__(self, start, loss, decay, momentum=0.0):
        super().__init__(nn.Linear(start.numel(), 1, bias=False).double(), loss)
        self.decay, self.momentum = decay, momentum
        with torch.no_grad():
            self.net.weight.copy_(start[None])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE, momentum=self.momentum, weight_decay=self.decay)


def half_squares(z, y):
    return 0.5 * (z[:, 0] - y).square().mean()


def logistic(z, y):
    return F.binary_cross_entropy_with_logits(z[:, 0], y)


def drawn(n, width, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)


def items(x, y):
    return Items(list(zip(x, y, strict=True)))


def trained(module, x, y, folder, epochs, batch=None):
    """An attributor of the captured fit."""
    loader = DataLoader(items(x, y), batch or len(x))
    fit(module, loader, Influence(dirpath=folder, every_n_epochs=max(1, epochs // 4)), max_epochs=epochs)
    return Attributor(module, items(x, y), Trajectory.load(folder))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_at_the_minimum_of_a_quadratic_it_is_a_truncated_inverse(tmp_path, momentum):
    """I5: (1/n) g^T [I - (I - lr H)^K] H^-1 g_i, and with momentum the same by the recursion of its two states."""
    decay, steps = 0.1, 7
    (x, y), (asked, answers) = drawn(12, 3, 0), drawn(4, 3, 1)
    hessian = x.T @ x / len(x) + decay * torch.eye(3, dtype=torch.float64)
    best = torch.linalg.solve(hessian, x.T @ y / len(x))
    attributor = trained(Descent(best, half_squares, decay, momentum), x, y, tmp_path, steps)
    scores = attributor.score(HyDRA(checks=0), items(asked, answers)).values
    gradients, queries = x * (x @ best - y)[:, None], asked * (asked @ best - answers)[:, None]
    moved, speed = torch.zeros(2, 3, len(x), dtype=torch.float64)
    for _ in range(steps):
        speed = momentum * speed + gradients.T / len(x) + hessian @ moved
        moved = moved - RATE * speed
    if not momentum:
        kept = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - RATE * hessian, steps)
        closed = torch.linalg.solve(hessian, torch.eye(3, dtype=torch.float64) - kept) @ gradients.T / len(x)
        torch.testing.assert_close(-moved, closed)
    assert_scores(scores, -queries @ moved, 1e-9)


def test_after_many_steps_it_is_the_influence_function(tmp_path):
    (x, y), (asked, answers) = drawn(12, 3, 0), drawn(4, 3, 1)
    attributor = trained(Descent(torch.zeros(3).double(), half_squares, 0.1), x, y, tmp_path, 400)
    found = attributor.score(HyDRA(checks=0), items(asked, answers)).values
    hessian = x.T @ x / len(x) + 0.1 * torch.eye(3, dtype=torch.float64)
    best = torch.linalg.solve(hessian, x.T @ y / len(x))
    gradients, queries = x * (x @ best - y)[:, None], asked * (asked @ best - answers)[:, None]
    assert_scores(found, queries @ torch.linalg.solve(hessian, gradients.T) / len(x), 1e-8)
    assert_scores(attributor.score(InfluenceFunction(ExactGGN(0)), items(asked, answers)).values, found, 1e-8)


def test_one_step_from_anywhere_is_tracin(tmp_path):
    """I7: a single step propagates nothing; TracIn takes the gradient of the query where the step begins."""
    (x, y), (asked, answers) = drawn(8, 3, 0), drawn(4, 3, 1)
    attributor = trained(Descent(torch.ones(3).double(), half_squares, 0.0), x, y, tmp_path, 1)
    start = torch.ones(3).double()
    end = start - RATE * x.T @ (x @ start - y) / len(x)
    gradients = x * (x @ start - y)[:, None]
    for method, where in ((HyDRA(checks=0), end), (TracIn(), start)):
        queries = asked * (asked @ where - answers)[:, None]
        found = attributor.score(method, items(asked, answers)).values
        assert_scores(found, RATE / len(x) * queries @ gradients.T, 1e-10)


def test_twins_in_the_same_steps_have_the_same_scores(tmp_path):
    """I17."""
    (x, y), (asked, answers) = drawn(8, 3, 0), drawn(4, 3, 1)
    x[5], y[5] = x[4], y[4]
    attributor = trained(Descent(torch.ones(3).double(), half_squares, 0.1, 0.5), x, y, tmp_path, 5, batch=4)
    found = attributor.score(HyDRA(checks=0), items(asked, answers)).values
    torch.testing.assert_close(found[:, 4], found[:, 5])


def test_its_unit_is_the_change_of_loss_when_the_example_is_left_out(tmp_path):
    """The slope of exact leave-one-out on the prediction is 1 but for an example's leverage, a hundredth here."""
    n, decay, steps = 150, 0.05, 120
    (x, noise), (asked, other) = drawn(n, 3, 0), drawn(12, 3, 1)
    way = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    y, answers = ((a @ way + b > 0).double() for a, b in ((x, noise), (asked, other)))
    attributor = trained(Descent(torch.zeros(3).double(), logistic, decay), x, y, tmp_path, steps)
    predicted = attributor.score(HyDRA(checks=0), items(asked, answers)).values

    def losses(weights):
        w = torch.zeros(3, dtype=torch.float64)
        for _ in range(steps):
            w = w - RATE * (x.T @ (weights * ((x @ w).sigmoid() - y)) / n + decay * w)
        return F.binary_cross_entropy_with_logits(asked @ w, answers, reduction="none")

    whole = losses(torch.ones(n, dtype=torch.float64))
    exact = torch.stack([losses(1 - F.one_hot(torch.tensor(i), n).double()) - whole for i in range(n)], 1)
    slope = float((exact * predicted).sum() / predicted.square().sum())
    assert abs(slope - 1) < 0.05
    assert float(torch.corrcoef(torch.stack([exact.flatten(), predicted.flatten()]))[0, 1]) > 0.999
