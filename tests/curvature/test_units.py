"""What influence functions say about their unit, and the damping that it depends on."""

import pytest
import pytorch_lightning as pl
import torch
from fits import fit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    EKFAC,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    ExactGGN,
    ExactHessian,
    Influence,
    InfluenceFunction,
    LiSSA,
    Refit,
    Trajectory,
)
from lightning_influence.curvature.leverage import weighted_leverage

torch.set_num_threads(1)
N, BATCH, EPOCHS, INPUTS, CLASSES = 40, 10, 12, 4, 3


class Softmax(pl.LightningModule):
    """A convex model: softmax regression, or with `hidden` units an MLP."""

    def __init__(self, make, hidden=0):
        super().__init__()
        torch.manual_seed(0)
        deep = hidden and nn.Sequential(nn.Linear(INPUTS, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))
        self.net = (deep or nn.Linear(INPUTS, CLASSES)).double()
        self.make = make

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self)


def data(n=N, noise=0.3, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, INPUTS, generator=g, dtype=torch.float64)
    y = (x[:, :CLASSES] + noise * torch.randn(n, CLASSES, generator=g, dtype=torch.float64) * 3).argmax(1)
    return TensorDataset(x, y)


def trained(folder, make, hidden=0, epochs=EPOCHS, train=None):
    module, train = Softmax(make, hidden), train or data()
    fit(module, DataLoader(train, BATCH), Influence(dirpath=folder, every_n_epochs=epochs), max_epochs=epochs)
    return Attributor(module, train, Trajectory.load(folder)), train.tensors


def by_hand(make, x, y, left_out=None, hidden=0, epochs=EPOCHS):
    """The same training without Lightning, one example's weight set to 0."""
    module = Softmax(make, hidden)
    optimizer = make(module)
    for _ in range(epochs):
        for ids in torch.arange(len(x)).split(BATCH):
            losses = F.cross_entropy(module.net(x[ids]), y[ids], reduction="none")
            optimizer.zero_grad()
            (losses * (ids != left_out)).mean().backward()
            optimizer.step()
    return module, optimizer


def slope(predicted, actual):
    predicted, actual = predicted - predicted.mean(), actual - actual.mean()
    return float((predicted * actual).sum() / actual.square().sum())


def grouped(kind, *settings):
    """An optimizer with weights and biases in groups of their own."""

    def make(module):
        sides = [[], []]
        for name, parameter in module.named_parameters():
            sides[name.endswith("bias")].append(parameter)
        return kind([{"params": side, **group} for side, group in zip(sides, settings, strict=True)])

    return make


ADAM = grouped(torch.optim.Adam, {"lr": 0.02}, {"lr": 0.02})
OPTIMIZERS = {
    "sgd": grouped(torch.optim.SGD, {"lr": 0.1}, {"lr": 0.1}),
    "momentum": grouped(torch.optim.SGD, {"lr": 0.05, "momentum": 0.8}, {"lr": 0.02, "momentum": 0.8}),
    "adam": ADAM,
    "adamw": grouped(torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.03, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_unit_is_loss_on_a_convex_model_and_leave_one_out_agrees(tmp_path, kind):
    make, ids = OPTIMIZERS[kind], range(0, N, 4)
    attributor, (x, y) = trained(tmp_path, make)
    before = F.cross_entropy(by_hand(make, x, y)[0].net(x), y, reduction="none")[:: ids.step]
    after = [F.cross_entropy(by_hand(make, x, y, i)[0].net(x[i]), y[i]) for i in ids]
    whole = attributor.self_influence(InfluenceFunction(ExactGGN())).diagnostics["damping"]
    for curvature in (ExactGGN(), EKFAC(), EKFAC(whole)):
        found = attributor.self_influence(InfluenceFunction(curvature))
        assert found.units == "loss" or curvature == EKFAC(), found.notes
        assert (
            found.units == "arbitrary"
            or 1 / 3 < slope(found.values[:: ids.step].double(), (torch.stack(after) - before).detach()) < 3
        )


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [5, 20, 150])
def test_the_unit_is_loss_only_where_leave_one_out_agrees_on_the_digits_after_adamw(tmp_path, epochs):
    """A tenth of the labels are wrong. After 150 epochs most are memorised: the exact curvature's slope is 0.1."""
    digits = pytest.importorskip("sklearn.datasets").load_digits
    x, y = (torch.tensor(part) for part in digits(return_X_y=True))
    x, y = x[:300].double() / 16, y[:300].clone()
    y[::10] = (y[::10] + 3) % 10
    train, ids = TensorDataset(x, y), list(range(0, 300, 5))
    make = lambda module: torch.optim.AdamW(module.parameters(), 3e-3, weight_decay=1e-2)  # noqa: E731
    module = Softmax(make)
    module.net = nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10)).double()
    fit(module, DataLoader(train, 50), Influence(dirpath=tmp_path, every_n_epochs=5), max_epochs=epochs)
    refit = Refit()
    attributor = Attributor(module, train, Trajectory.load(tmp_path), refit=refit)
    truth = refit.bank(TensorDataset(x[ids], y[ids]), leave_out=ids).changes.diagonal()
    for curvature in (EKFAC(), ConjugateGradient()):
        found = attributor.self_influence(InfluenceFunction(curvature))
        near = 1 / 3 < slope(found.values[ids].double(), truth) < 3
        assert near or found.units == "arbitrary"
        assert found.units == "loss" or epochs == 150 or isinstance(curvature, EKFAC)


@pytest.mark.parametrize(
    ("make", "decay"),
    [
        (grouped(torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.95)}, {"lr": 0.01, "eps": 1e-3}), (0, 0)),
        (grouped(torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.5}, {"lr": 0.03, "weight_decay": 0.1}), (0.5, 0.1)),
        (grouped(torch.optim.AdamW, {"lr": 0.02, "amsgrad": True, "weight_decay": 0}, {"amsgrad": True}), (0, 0.01)),
    ],
    ids=["adam", "adamw", "amsgrad"],
)
@pytest.mark.parametrize("curvature", [ExactGGN(), EKFAC()], ids=repr)
def test_after_adam_the_damping_is_its_root_of_mean_squares_over_the_sum_of_learning_rates(
    tmp_path, make, decay, curvature
):
    attributor, tensors = trained(tmp_path, make, hidden=3, epochs=4)
    found = attributor.score(InfluenceFunction(curvature), data(3, seed=5))
    _, optimizer = by_hand(make, *tensors, hidden=3, epochs=4)
    expected = []
    for group, shrinks in zip(optimizer.param_groups, decay, strict=True):
        roots = []
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            square = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1 - group["betas"][1] ** float(state["step"]))
            roots.append((square.sqrt() + group["eps"]).flatten())
        root = torch.cat(roots)
        reach = 16 * group["lr"]
        expected.append(curvature.share * float((root**2).sum() / root.sum()) * (1 / reach + shrinks))
    assert found.diagnostics["damping"] == pytest.approx(max(expected), rel=1e-9)
    shown = ", ".join(f"{value:.3g}" for value in expected)
    assert any(note.startswith(f"Damping {shown} (") and "Adam's mean root" in note for note in found.notes)


def test_inputs_that_are_always_zero_do_not_change_the_damping(tmp_path):
    found = []
    for wide in (False, True):
        module = Softmax(ADAM)
        plain = data()
        if wide:
            with torch.no_grad():
                weight = torch.cat([module.net.weight, torch.zeros(CLASSES, 50).double()], 1)
            module.net = nn.Linear(INPUTS + 50, CLASSES).double()
            with torch.no_grad():
                module.net.weight.copy_(weight)
                module.net.bias.copy_(Softmax(ADAM).net.bias)
            plain = TensorDataset(F.pad(plain.tensors[0], (0, 50)), plain.tensors[1])
        folder = tmp_path / str(wide)
        fit(module, DataLoader(plain, BATCH), Influence(dirpath=folder), max_epochs=3)
        attributor = Attributor(module, plain, Trajectory.load(folder))
        found.append(attributor.self_influence(InfluenceFunction(EKFAC())))
    assert found[1].diagnostics["damping"] == pytest.approx(found[0].diagnostics["damping"], rel=1e-6)
    torch.testing.assert_close(found[1].values, found[0].values, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda module: torch.optim.RMSprop(module.parameters(), 0.01),
        lambda module: torch.optim.Adagrad(module.parameters(), 0.01),
        lambda module: torch.optim.NAdam(module.parameters(), 0.01),
        lambda module: Own(module.parameters(), 0.01),
    ],
    ids=["rmsprop", "adagrad", "nadam", "own"],
)
def test_after_other_optimizers_it_is_arbitrary(tmp_path, make):
    attributor, _ = trained(tmp_path, make, epochs=2)
    found = attributor.self_influence(InfluenceFunction(ExactGGN()))
    assert found.units == "arbitrary"
    assert any("unit of the scores is arbitrary" in note and "length of the fit" in note for note in found.notes)
    assert any("0.1 x mean eigenvalue, since the optimizer is adaptive" in note for note in found.notes)


class Own(torch.optim.Adam):
    def step(self, closure=None):
        found = super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.99)
        return found


def test_a_given_damping_has_the_unit_only_near_that_of_the_fit(tmp_path):
    attributor, _ = trained(tmp_path, ADAM)
    queries = data(3, seed=5)
    rule = attributor.score(InfluenceFunction(ExactGGN()), queries).diagnostics["damping"]
    units = {
        factor: attributor.score(InfluenceFunction(ExactGGN(factor * rule)), queries).units
        for factor in (0.01, 0.5, 1.0, 2.0, 100.0)
    }
    assert units == {0.01: "arbitrary", 0.5: "loss", 1.0: "loss", 2.0: "loss", 100.0: "arbitrary"}
    alone = Attributor(Softmax(ADAM), data()).score(InfluenceFunction(ExactGGN(rule)), queries)
    assert alone.units == "arbitrary"  # without a trajectory nobody knows


def test_weight_decay_can_stand_for_the_fit_alone(tmp_path):
    make = grouped(torch.optim.SGD, {"lr": 0.5, "weight_decay": 0.1}, {"lr": 0.5, "weight_decay": 0.1})
    attributor, _ = trained(tmp_path, make, epochs=60)
    assert attributor.score(InfluenceFunction(ExactGGN(0.0)), data(3, seed=5)).units == "loss"


CURVATURES = [ExactGGN(), EKFAC(), ConjugateGradient(), LiSSA(), Arnoldi(), ExactHessian()]


@pytest.fixture(scope="module")
def memorised(tmp_path_factory):
    make = grouped(torch.optim.Adam, {"lr": 0.05}, {"lr": 0.05})
    return trained(tmp_path_factory.mktemp("run"), make, hidden=16, epochs=60, train=data(20, noise=3.0))[0]


@pytest.mark.parametrize("curvature", CURVATURES, ids=lambda c: type(c).__name__)
def test_where_examples_are_memorised_it_is_arbitrary(memorised, curvature):
    attributor = memorised
    assert float(attributor.losses().values.max()) < 0.1
    found = attributor.self_influence(InfluenceFunction(curvature))
    assert found.units == "arbitrary"
    assert any("memorised" in note for note in found.notes)
    assert found.diagnostics["leverage"] > 0.4
    assert "no unit" in " ".join(str(found).split())


def test_the_leverage_of_a_linear_regression_is_that_of_its_hat_matrix():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=g, dtype=torch.float64), torch.randn(30, generator=g, dtype=torch.float64)
    inverse = torch.linalg.inv(x.T @ x)
    residuals = x @ inverse @ x.T @ y - y
    hat = (x @ inverse * x).sum(1)
    own, losses = hat * residuals**2, residuals**2 / 2
    expected = float((own * hat).sum() / own.sum())
    assert weighted_leverage(own, losses, squared=True) == pytest.approx(expected, rel=1e-12)


def test_the_leverage_of_a_logistic_regression_is_that_of_its_weighted_hat_matrix():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=g, dtype=torch.float64)
    y = (torch.rand(30, generator=g) < 0.5).double()
    z = x @ torch.randn(4, generator=g, dtype=torch.float64)
    p = z.sigmoid()
    inverse = torch.linalg.inv(x.T @ (x * (p * (1 - p))[:, None]) + torch.eye(4))
    form = (x @ inverse * x).sum(1)
    own, hat = form * (p - y) ** 2, form * p * (1 - p)
    losses = F.binary_cross_entropy(p, y, reduction="none")
    assert weighted_leverage(own, losses) == pytest.approx(float((own * hat).sum() / own.sum()), rel=1e-12)


def test_examples_without_a_loss_or_influence_have_no_leverage():
    own, losses = torch.tensor([0.0, torch.nan, 1.0, 0.2]).double(), torch.tensor([1.0, 1.0, -1.0, 1.0]).double()
    assert weighted_leverage(own, losses) == pytest.approx(0.2 / (torch.e - 1))
    assert weighted_leverage(own[:2], losses[:2]) != weighted_leverage(own[:2], losses[:2])  # NaN
