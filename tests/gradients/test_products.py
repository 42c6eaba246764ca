"""H·v and GGN·v over the training set against dense matrices made by loops."""

import oracles_curvature as dense
import pytest
import torch
from case import Call, Items, Step, both, inputs, mlp
from torch import nn
from torch.nn import functional as F

from lightning_influence import Attributor
from lightning_influence.gradients import vjp
from lightning_influence.gradients.products import Products

torch.set_num_threads(1)


def squared(z, y):
    return (z - y).pow(2).mean()


def probabilities(z, y):
    return F.binary_cross_entropy(torch.sigmoid(z).squeeze(-1), y)


def unsqueezed(z, y):
    return F.binary_cross_entropy_with_logits(z.squeeze(-1), y)


def summed(z, y):
    return F.cross_entropy(z, y, reduction="sum")


def log_probabilities(z, y):
    return F.nll_loss(F.log_softmax(z, -1), y)


def by_keyword(z, y):
    return F.cross_entropy(input=z, target=y)


def target_first(z, y):
    return F.mse_loss(y[:, None], z)


def plain(module, one):
    return module.net(one[0])


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, ids):
        return F.linear(self.norm(self.table(ids).mean(1)), self.table.weight)


def conv():
    return nn.Sequential(nn.Conv2d(2, 2, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(8, 3))


def attention():
    layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.3, batch_first=True)
    return nn.Sequential(layer, Call(lambda x: x.mean(1)), nn.Linear(4, 3))


def wide():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def to_columns(make):
    return lambda: Items([(x, y[None]) for x, y in make().items])


CASES = {
    "cross-entropy": (mlp, F.cross_entropy, both(5)["train"], dense.softmax_bend),
    "the sum over a batch": (mlp, summed, both(5)["train"], dense.softmax_bend),
    "log-probabilities": (mlp, log_probabilities, both(5)["train"], dense.softmax_bend),
    "keywords": (mlp, by_keyword, both(5)["train"], dense.softmax_bend),
    "squared error": (wide, F.mse_loss, to_columns(inputs(5, target="number")), dense.square_bend),
    "the target first": (wide, target_first, inputs(5, target="number"), dense.square_bend),
    "no function of torch": (wide, squared, to_columns(inputs(5, target="number")), dense.square_bend),
    "probabilities": (wide, probabilities, inputs(5, target="binary"), dense.sigmoid_bend),
    "logits": (wide, unsqueezed, inputs(5, target="binary"), dense.sigmoid_bend),
    "convolution": (conv, F.cross_entropy, inputs(2, 6, 6), dense.softmax_bend),
    "tied embedding": (Tied, F.cross_entropy, inputs(3, high=4, classes=4), dense.softmax_bend),
    "attention": (attention, F.cross_entropy, inputs(3, 4), dense.softmax_bend),
}


def opened(net, loss, data, **options):
    torch.manual_seed(0)
    module = Step(net(), loss).double()
    return module, Attributor(module, data, **options)


def columns(attributor, matrix, ids=None):
    """The dense matrix by products with unit vectors, with the parameters' names in its order."""
    with attributor._session.open() as session:
        products = Products(session.engine, session.examples)
        unit = torch.eye(len(products.flat), dtype=products.like.dtype)
        return products.times(matrix, unit, ids), list(products.flat.shapes), products.gradient(ids or [0])


@pytest.mark.parametrize("name", CASES)
def test_products_with_unit_vectors_are_the_dense_matrix(name):
    net, loss, make, bend = CASES[name]
    module, attributor = opened(net, loss, make(), batch_size=3)
    ones = [[part[None] for part in make()[i]] for i in range(8)]
    found, names, _ = columns(attributor, "ggn")
    expected = dense.each_ggn(module, ones, names, plain, bend).mean(0)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if name in ("cross-entropy", "the sum over a batch", "tied embedding", "no function of torch"):
        found, names, _ = columns(attributor, "hessian")
        torch.testing.assert_close(found, dense.hessian(module, ones, names), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_of_some_examples_the_sum_is_taken(matrix):
    module, attributor = opened(mlp, F.cross_entropy, both(5)["train"]())
    ones = [[part[None] for part in both(5)["train"]()[i]] for i in (6, 1, 1)]
    found, names, gradient = columns(attributor, matrix, [6, 1, 1])
    if matrix == "ggn":
        expected = dense.each_ggn(module, ones, names, plain, dense.softmax_bend).sum(0)
    else:
        expected = 3 * dense.hessian(module, ones, names)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient[0], dense.gradients(module, ones, names).sum(0))


def test_vectors_in_chunks_and_one_by_one_where_vmap_cannot(monkeypatch):
    _, attributor = opened(mlp, F.cross_entropy, both(5)["train"]())
    whole, _, _ = columns(attributor, "ggn")
    for size in (1, 1250):  # one after another; some at once
        with monkeypatch.context() as patch:
            patch.setattr(vjp, "workspace", lambda device, size=size: size)
            torch.testing.assert_close(columns(attributor, "ggn")[0], whole)
    real, batched = torch.autograd.grad, []

    def grad(*args, is_grads_batched=False, **kwargs):
        if is_grads_batched:
            batched.append(1)
            raise RuntimeError("vmap: no rule")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    torch.testing.assert_close(columns(attributor, "ggn")[0], whole)
    assert batched


def test_a_loss_with_a_penalty_has_no_gauss_newton_matrix_but_a_hessian():
    class Penalised(Step):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.net[0].weight.pow(2).sum()

    module = Penalised(mlp()).double()
    attributor = Attributor(module, both(5)["train"]())
    with pytest.raises(ValueError, match=r"`net.0.weight` reaching it by another path.*matrix='hessian'"):
        columns(attributor, "ggn")
    ones = [[part[None] for part in both(5)["train"]()[i]] for i in range(8)]
    found, names, _ = columns(attributor, "hessian")
    torch.testing.assert_close(found, dense.hessian(module, ones, names))


def test_a_network_whose_end_is_not_seen_is_refused():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(5, 3, batch_first=True)

        def forward(self, x):
            return torch.ops.aten.mul(self.layer(x[:, None])[0][:, 0], 2.0)

    _, attributor = opened(Pair, lambda z, y: (z.sum(-1) - y).pow(2).mean(), inputs(5, target="number")())
    with pytest.raises(ValueError, match=r"a network output that is passed to a loss function.*got none"):
        columns(attributor, "ggn")
