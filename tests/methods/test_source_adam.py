"""SOURCE where steps are preconditioned (Adam, AdamW) or parameter groups differ: against matrix exponentials."""

import oracles
import oracles_curvature as dense
import pytest
import torch
from case import Step, both, mlp
from fits import fit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from traced import still

from lightning_influence import (
    EKFAC,
    SOURCE,
    Attributor,
    ExactGGN,
    ExactHessian,
    Influence,
    InfluenceFunction,
    MissingEvidence,
    Trajectory,
)
from lightning_influence.conformance import check_method
from lightning_influence.curvature.descent import Descent
from lightning_influence.curvature.kronecker_descent import descend_layer

torch.set_num_threads(1)
EPOCHS, BATCH, RUNS = 5, 3, [(1, 2), (3,), (4, 5)]


class Grouped(Step):
    """Weights and biases in groups of their own."""

    def __init__(self, net, loss, kind, settings):
        super().__init__(net, loss)
        self.kind, self.settings = kind, settings

    def configure_optimizers(self):
        sides = [[], []]
        for name, parameter in self.named_parameters():
            sides[name.endswith("bias")].append(parameter)
        groups = [{"params": side, **group} for side, group in zip(sides, self.settings, strict=True)]
        return getattr(torch.optim, self.kind)(groups)


FITS = {
    "adam": ("Adam", ({"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}, {"lr": 0.01, "eps": 1e-3})),
    "adamw": ("AdamW", ({"lr": 0.02, "weight_decay": 0.5}, {"lr": 0.03, "weight_decay": 0.1})),
    "amsgrad": ("AdamW", ({"lr": 0.02, "amsgrad": True}, {"lr": 0.02, "amsgrad": True})),
    "sgd": ("SGD", ({"lr": 0.2, "momentum": 0.5, "weight_decay": 0.1}, {"lr": 0.05})),
}


def squared(z, y):
    return (z[:, 0] - y).square().mean()


def fitted(folder, case, net=mlp, loss=nn.functional.cross_entropy, target="class", kind=Grouped):
    torch.manual_seed(0)
    data = both(5) if target == "class" else both(5, target=target)
    module, train = kind(net(), loss, *FITS[case]).double(), data["train"]()
    fit(module, DataLoader(train, BATCH, shuffle=True), Influence(dirpath=folder), max_epochs=EPOCHS)
    return module, train, data["queries"](), Trajectory.load(folder)


def segments_of(case, module, train, trajectory, bend=dense.softmax_bend):
    """For the oracle: (curvature, pace, shrunk, gradients) of each segment, by the state in its middle."""
    kind, settings = FITS[case]
    names, ones = [n for n, _ in module.named_parameters()], [[part[None] for part in item] for item in train.items]
    states = [checkpoint.load() for checkpoint in trajectory.checkpoints]
    found = []
    for run in RUNS:
        middle, steps = states[run[len(run) // 2]], len(run) * -(-len(train) // BATCH)
        pace, shrunk, decay = [], [], []
        for name in names:
            group, shape = settings[name.endswith("bias")], middle.parameters[name].shape
            scale, own = torch.ones(shape, dtype=torch.float64), middle.optimizer.get(name, {})
            if kind != "SGD" and not own:
                scale = torch.zeros(shape, dtype=torch.float64)
            elif kind != "SGD":
                square = own["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
                beta = group.get("betas", (0.9, 0.999))[1]
                root = (square / (1 - beta ** float(own["step"]))).sqrt()
                scale = torch.where(square > 0, 1 / (root + group.get("eps", 1e-8)), 0.0)
            reach = steps * group["lr"] / (1 - group.get("momentum", 0))
            wanted = group.get("weight_decay", 0.01 if kind == "AdamW" else 0.0)
            pace.append(reach * scale.flatten())
            shrunk.append(reach * wanted * (kind == "AdamW") * (scale.flatten() > 0).double())
            decay.append(torch.full((scale.numel(),), wanted * (kind != "AdamW"), dtype=torch.float64))
        each = dense.each_ggn(module, ones, names, lambda m, one: m.net(one[0]), bend, middle.parameters)
        gradients = [dense.gradients(module, ones, names, state=states[k].parameters) for k in run]
        curvature = each.mean(0) + torch.diag(torch.cat(decay))
        found.append((curvature, torch.cat(pace), torch.cat(shrunk), torch.stack(gradients).mean(0)))
    return found


def asked_of(module, queries, trajectory):
    names = [n for n, _ in module.named_parameters()]
    ones = [[part[None] for part in item] for item in queries.items]
    return dense.gradients(module, ones, names, state=trajectory.checkpoints[-1].load().parameters)


@pytest.mark.parametrize("case", FITS)
def test_scores_are_those_of_matrix_exponentials(case, tmp_path):
    module, train, queries, trajectory = fitted(tmp_path, case)
    found = Attributor(module, train, trajectory).score(SOURCE(3, ExactGGN()), queries)
    segments, asked = segments_of(case, module, train, trajectory), asked_of(module, queries, trajectory)
    expected = dense.preconditioned_source(asked, segments)
    oracles.assert_scores(found.values, expected, 1e-8)
    assert found.units == "loss"
    assert any("preconditioner is frozen" in note for note in found.notes) == (case != "sgd")


def test_the_oracle_is_the_limit_of_small_steps(tmp_path):
    module, train, queries, trajectory = fitted(tmp_path, "adamw")
    segments, asked = segments_of("adamw", module, train, trajectory), asked_of(module, queries, trajectory)
    limit = dense.preconditioned_source(asked, segments)
    far, near = (float((dense.walked_source(asked, segments, n) - limit).abs().max()) for n in (2_000, 4_000))
    assert near < 0.01 * float(limit.abs().max())
    assert near == pytest.approx(far / 2, rel=0.1)


def test_ekfac_takes_the_preconditioner_as_its_diagonal_in_the_eigenbasis(tmp_path):
    """One layer with one output: the factors are exact, and the basis is that of the layer's inputs."""
    options = {"net": lambda: nn.Linear(5, 1, bias=False), "loss": squared, "target": "number"}
    module, train, queries, trajectory = fitted(tmp_path, "adamw", **options)
    found = Attributor(module, train, trajectory).score(SOURCE(3, EKFAC(labels="exact", tolerance=0)), queries)
    total, carried = 0.0, asked_of(module, queries, trajectory)
    segments = segments_of("adamw", module, train, trajectory, dense.square_bend)
    for curvature, pace, shrunk, gradients in reversed(segments):
        values, basis = torch.linalg.eigh(curvature)
        diagonal = basis.square().T @ pace
        exponents = diagonal * values + basis.square().T @ shrunk
        total = total + carried @ basis * (diagonal * -torch.expm1(-exponents) / exponents) @ basis.T @ gradients.T
        carried = carried @ basis * torch.exp(-exponents) @ basis.T
    oracles.assert_scores(found.values, total / len(train), 1e-8)
    assert any("only its diagonal there is used" in note for note in found.notes)


@pytest.mark.parametrize(("out", "wide"), [(2, 2), (3, 2), (2, 3), (1, 1)])
def test_directions_that_no_gradient_has_are_moved_without_being_bent(out, wide):
    """A layer whose bases are not whole, at one pace: the curvature is zero outside of them."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=draw).double())[0] for n, k in ((3, out), (4, wide)))
    values, pace, added = torch.rand(out, wide, generator=draw).double(), 0.7, 0.2
    kept = {"basis_out": left, "basis_in": right, "eigenvalues": values, "transposed": torch.tensor(False)}
    whole = {"weight": torch.ones(3, 4, dtype=torch.float64)}
    descent = Descent(*({n: number * one for n, one in whole.items()} for number in (pace, added, 0.0)))
    vectors = torch.randn(5, 3, 4, generator=draw).double()
    moved, left_over = descend_layer(("weight",), kept, descent, {"weight": vectors})
    basis = torch.kron(left, right)
    rate = pace * (basis * values.flatten() @ basis.T + added * torch.eye(12, dtype=torch.float64))
    remains = torch.linalg.matrix_exp(-rate)
    gone = torch.linalg.solve(rate, torch.eye(12, dtype=torch.float64) - remains) * pace
    torch.testing.assert_close(left_over["weight"].flatten(1), vectors.flatten(1) @ remains)
    torch.testing.assert_close(moved["weight"].flatten(1), vectors.flatten(1) @ gone)


def test_ekfac_and_the_dense_curvature_agree_about_groups_of_sgd(tmp_path):
    """Weights and biases of a layer move at paces of their own; nothing is approximated but the curvature."""
    module, train, queries, trajectory = fitted(tmp_path, "sgd")
    attributor = Attributor(module, train, trajectory)
    found, exact = (attributor.score(SOURCE(3, c), queries).values for c in (EKFAC(labels="exact"), ExactGGN()))
    both_ways = torch.stack([found.flatten(), exact.flatten()])
    assert float(torch.corrcoef(both_ways)[0, 1]) > 0.7


class Late(Grouped):
    """Its last bias trains from the fourth epoch on, behind the middles of the first two segments."""

    def on_train_epoch_start(self):
        self.net[-1].bias.requires_grad_(self.current_epoch >= 3)


def test_a_parameter_that_adam_had_not_moved_stands_still(tmp_path):
    module, train, queries, trajectory = fitted(tmp_path, "adamw", kind=Late)
    found = Attributor(module, train, trajectory).score(SOURCE(3, ExactGGN()), queries)
    segments, asked = segments_of("adamw", module, train, trajectory), asked_of(module, queries, trajectory)
    assert [int((pace == 0).sum()) for _, pace, *_ in segments] == [3, 3, 0]
    oracles.assert_scores(found.values, dense.preconditioned_source(asked, segments), 1e-8)
    assert any(
        "Adam had not updated net.2.bias yet: these parameters are taken as fixed" in note for note in found.notes
    )


class Sparse(Step):
    """Rare inputs and units that are switched off: some weights have had no gradient by the middle of the fit."""

    def __init__(self, eps):
        super().__init__(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)))
        self.eps = eps

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, eps=self.eps)


def sparse(seed, n):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 20, generator=draw).clamp(min=0) * (torch.rand(n, 20, generator=draw) < 0.2)
    x[:, :5] = 0
    return TensorDataset(x, (x[:, 10:13] + 0.3 * torch.randn(n, 3, generator=draw)).argmax(1))


@pytest.mark.parametrize("eps", [pytest.param(1e-8, marks=pytest.mark.slow), 1e-20])
def test_weights_that_had_no_gradient_yet_stand_still(eps, tmp_path):
    """At 1 / eps they gave scores of 10^5 with the default eps, and of 10^17 with the smaller one."""
    train, queries = sparse(0, 40), sparse(1, 10)
    torch.manual_seed(0)
    module = Sparse(eps)
    fit(module, DataLoader(train, 20, shuffle=True), Influence(dirpath=tmp_path), max_epochs=4)
    single = Attributor(module, train, Trajectory.load(tmp_path))
    wide = [TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in (train, queries)]
    double = Attributor(Sparse(eps).double(), wide[0], single.trajectory, check_data=False)
    for method in (SOURCE(1, EKFAC(tolerance=0)), SOURCE(1, ExactGGN())):
        found = single.score(method, queries)
        assert float(found.values.abs().max()) < 5
        assert found.units == "loss"
        oracles.assert_scores(found.values.double(), double.score(method, wide[1]).values, 1e-2)


def test_it_keeps_every_promise():
    check_method(SOURCE(2, EKFAC()))


@pytest.mark.parametrize(
    ("group", "error", "text"),
    [
        ({"betas": (0.9, 0.999)}, MissingEvidence, "with the state of Adam.*got files that `Trajectory.from_checkp"),
        ({"alpha": 0.99}, ValueError, "Expected a fit by SGD, Adam or AdamW, got"),
        ({"dampening": 0, "maximize": True}, ValueError, "got an optimizer with `maximize=True`"),
    ],
)
def test_fits_that_it_cannot_follow_are_refused(tmp_path, group, error, text):
    data = both(5, target="number")
    module = Step(nn.Linear(5, 1), squared).double()
    attributor = Attributor(module, data["train"](), still(module, tmp_path, group))
    with pytest.raises(error, match=text):
        attributor.score(SOURCE(1, ExactGGN()), data["queries"]())


def test_influence_functions_refuse_a_fit_that_maximises(tmp_path):
    data, module = both(5, target="number"), Step(nn.Linear(5, 1), squared).double()
    attributor = Attributor(module, data["train"](), still(module, tmp_path, {"dampening": 0, "maximize": True}))
    for method in (InfluenceFunction(EKFAC()), InfluenceFunction(ExactHessian(), "renormalize")):
        with pytest.raises(ValueError, match=r"`maximize=True`\. Return minus that value from `training_step`"):
            attributor.score(method, data["queries"]())
        with pytest.raises(ValueError, match="`maximize=True`"):
            attributor.self_influence(method)


def test_a_checkpoint_whose_optimizer_state_is_gone(tmp_path, monkeypatch):
    module, train, queries, trajectory = fitted(tmp_path, "adam")
    real = type(trajectory.checkpoints[0]).load

    def bare(checkpoint):
        state = real(checkpoint)
        state.optimizer.clear()
        return state

    monkeypatch.setattr(type(trajectory.checkpoints[0]), "load", bare)
    with pytest.raises(MissingEvidence, match=r"Expected checkpoints with the state of Adam.* got none at step"):
        Attributor(module, train, trajectory).score(SOURCE(3, ExactGGN()), queries)
