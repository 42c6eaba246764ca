"""Gradients of examples of which the model is so certain that float64 loses them, too: compared with formulas."""

import oracles
import pytest
import torch
from case import Items, Step
from torch import nn
from torch.nn import functional as F

from lightning_influence import Attributor, GradientDot
from lightning_influence.numerics import log_probabilities

GAPS = torch.tensor([0.5, 15.0, 25.0, 40.0, 60.0], dtype=torch.float64)


def softmax_gradient(z, y):
    """Of the cross-entropy with respect to the logits: the own class's is minus the sum of the others'."""
    p = torch.exp(z - z.logsumexp(1, keepdim=True))
    p[torch.arange(len(y)), y] = 0.0
    p[torch.arange(len(y)), y] = -p.sum(1)
    return p


def sigmoid_gradient(z, y):
    """Of the binary cross-entropy."""
    return torch.where(y == 1, -torch.sigmoid(-z), torch.sigmoid(z))


LOSSES = {
    "cross_entropy": (F.cross_entropy, softmax_gradient),
    "binary_cross_entropy_with_logits": (
        lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).to(z), reduction="none").sum(1).mean(),
        lambda z, y: sigmoid_gradient(z, F.one_hot(y, 3)),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_certain_queries_are_those_of_the_formula(name, dtype):
    loss, formula = LOSSES[name]
    net = nn.Linear(3, 3, bias=False).to(dtype)
    with torch.no_grad():
        net.weight.copy_(torch.eye(3) + 0.1)
    y = torch.arange(5) % 3
    x = torch.full((5, 3), 0.25, dtype=dtype)
    x[torch.arange(5), y] += GAPS.to(dtype)
    if name != "cross_entropy":  # certain of the other classes, too
        x = x - 0.5 * GAPS[:, None].to(dtype)
    train = Items(list(zip(x[:2], (y[:2] + 1) % 3, strict=True)))
    scores = Attributor(Step(net, loss), train).score(GradientDot(), Items(list(zip(x, y, strict=True)))).values
    x, weight = x.double(), net.weight.detach().double()
    of_queries, of_train = formula(x @ weight.T, y), formula((x @ weight.T)[:2], (y[:2] + 1) % 3)
    expected = (of_queries @ of_train.T) * (x @ x[:2].T)
    oracles.assert_scores(scores, expected, 1e-4)


def test_queries_with_gradients_too_small_for_float32_are_counted():
    net = nn.Linear(3, 3)
    with torch.no_grad():
        net.weight.copy_(torch.eye(3))
    x, y = torch.tensor([[200.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 0])
    data = Items(list(zip(x, y, strict=True)))
    scores = Attributor(Step(net), data).score(GradientDot(), data)
    assert scores.diagnostics["queries_without_scores"] == 1
    assert any(
        "Queries with a score of 0 for every training example: 1." in note and "module.double()" in note
        for note in scores.notes
    )
    with torch.no_grad():
        net.bias.copy_(torch.tensor([-100.0, 0.0, 0.0]))
    assert not Attributor(Step(net), data).score(GradientDot(), Items([data[1]])).diagnostics


@pytest.mark.parametrize("gap", [0.0, 20.0, 60.0])
def test_losses_keep_their_digits_in_float32(gap):
    z = torch.tensor([[gap, 0.0, 0.0]])
    value = log_probabilities.cross_entropy(z, torch.tensor([0]))
    torch.testing.assert_close(value.double(), torch.log1p(2 * torch.exp(-z[0, 0].double())), rtol=1e-6, atol=0.0)


OPTIONS = [
    {"weight": w, "label_smoothing": s, "reduction": r, "ignore_index": i}
    for w in (None, torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))
    for s in (0.0, 0.1, 1.0)
    for r in ("mean", "sum", "none")
    for i in (-100, 1)
]
SHAPES = [((4, 3), (4,)), ((3,), ()), ((2, 3, 5), (2, 5)), ((2, 3, 2, 4), (2, 2, 4))]


def derivatives(function, x, *args, **options):
    """Value, gradient, and the Hessian times a vector."""
    x = x.clone().requires_grad_()
    value = function(x, *args, **options)
    (gradient,) = torch.autograd.grad(
        (value * torch.arange(1, value.numel() + 1).view_as(value)).sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(gradient.sin().sum(), x)
    return value, gradient, second


def assert_same(name, x, *args, **options):
    ours = derivatives(getattr(log_probabilities, name), x, *args, **options)
    for a, b in zip(ours, derivatives(getattr(F, name), x, *args, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("many", [None, 4], ids=["as a whole", "in slices"])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_cross_entropy_is_that_of_torch(shapes, many, monkeypatch):
    if many:
        monkeypatch.setattr(log_probabilities, "_MANY", many)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(shapes[0], generator=g, dtype=torch.float64), torch.randint(3, shapes[1], generator=g)
    for options in OPTIONS:
        assert_same("cross_entropy", x, y, **options)
        assert_same("cross_entropy", x, torch.rand_like(x), **{**options, "ignore_index": -100})
    assert_same("cross_entropy", torch.zeros_like(x), y)  # all classes equally probable
    for dim in range(-x.ndim, x.ndim):
        assert_same("log_softmax", x, dim)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_odd_logits_are_those_of_torch():
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1, 1, 2, 0])
    assert_same("cross_entropy", x, y, size_average=False)
    for position, value in (((0, 0), -torch.inf), ((1, 0), torch.inf), ((2,), -torch.inf), ((3, 2), torch.nan)):
        x[position] = value
        assert_same("cross_entropy", x, y, reduction="none")
    assert log_probabilities.cross_entropy(torch.empty(0, 3), torch.empty(0).long(), reduction="sum") == 0


def test_binary_cross_entropy_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    some = torch.rand(3, generator=g, dtype=torch.float64)
    for options in ({}, {"weight": some}, {"pos_weight": some}, {"weight": some, "pos_weight": some}):
        for reduction in ("mean", "sum", "none"):
            assert_same("binary_cross_entropy_with_logits", 3 * x, y.sigmoid(), reduction=reduction, **options)
            assert_same("binary_cross_entropy_with_logits", 0 * x, y.sigmoid(), reduction=reduction, **options)


def test_slices_of_many_logits_go_backwards_for_several_vectors_at_once(monkeypatch):
    x, y = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.arange(7) % 3
    vectors = torch.randn(4, 7, dtype=torch.float64)
    monkeypatch.setattr(log_probabilities, "_MANY", 4)
    ours, torchs = (
        torch.autograd.grad(f(x, y, reduction="none"), x, vectors, is_grads_batched=True)
        for f in (log_probabilities.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, torchs)


def test_they_run_under_the_transforms_of_torch():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])

    def each(cross_entropy):
        one = torch.func.grad(lambda x, y: cross_entropy(x[None], y[None], label_smoothing=0.1))
        return torch.func.vmap(one)(x, y)

    torch.testing.assert_close(each(log_probabilities.cross_entropy), each(F.cross_entropy))
    ours, torchs = (
        torch.func.jvp(lambda z: f(z, y), (x,), (x.sin(),)) for f in (log_probabilities.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, torchs)
    x.requires_grad_()  # backwards through what was computed forwards
    ours, torchs = (
        torch.autograd.grad(torch.func.jvp(lambda z: f(z, y), (x,), (x.sin(),))[1], x)
        for f in (log_probabilities.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, torchs)
