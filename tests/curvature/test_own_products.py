"""Products of gradients with themselves through the inverse curvature, against dense algebra, for all layers."""

import oracles
import oracles_kronecker as kronecker
import pytest
import torch
from case import Step, both
from torch import nn
from torch.utils.data import DataLoader

from curvature.test_ekfac import DAMPING, NETS, OTHERS, other, problem, seen
from lightning_influence import EKFAC, Arnoldi, Attributor, ConjugateGradient, ExactGGN, InfluenceFunction
from lightning_influence.curvature import factors
from lightning_influence.curvature.kronecker_part import KroneckerInverse, KroneckerPart
from lightning_influence.gradients.outer_products import OuterProducts

torch.set_num_threads(1)


def own(module, train, curvature=None, **options):
    curvature = curvature or EKFAC(DAMPING, labels="empirical")
    return Attributor(module, train, **options).self_influence(InfluenceFunction(curvature)).values


@pytest.mark.parametrize("corrected", [True, False], ids=["ekfac", "kfac"])
@pytest.mark.parametrize("name", NETS)
def test_self_influence_is_the_diagonal_of_the_dense_inverses(name, corrected):
    module, train, _ = problem(name)
    layers = seen(module, train)
    expected = kronecker.score(layers, layers, layers, DAMPING, corrected).diagonal()
    curvature = EKFAC(DAMPING, corrected, "empirical")  # never at low rank, whatever the tolerance
    for size in (None, 5):
        oracles.assert_scores(own(module, train, curvature, batch_size=size), expected, 1e-9)


def test_relatif_of_itself_is_that_of_the_dense_inverses():
    module, train, _ = problem("convolutions")
    products, squares = 0.0, 0.0
    for of_layer in seen(module, train).values():
        fisher = kronecker.dense_fisher(*kronecker.factors(of_layer)[:3])
        rows = kronecker.matrices(of_layer).flatten(1)
        solved = torch.linalg.solve(fisher + DAMPING * torch.eye(len(fisher), dtype=torch.float64), rows.T).T
        products, squares = products + (solved * rows).sum(1), squares + solved.square().sum(1)
    for normalize, expected in (("relatif", products / squares.sqrt()), ("relatif-loss", products.sqrt())):
        method = InfluenceFunction(EKFAC(DAMPING, labels="empirical"), normalize=normalize)
        oracles.assert_scores(Attributor(module, train).self_influence(method).values, expected, 1e-9)


class Wide(nn.Module):
    """Inputs that are wider than there are examples, of one or several positions."""

    def __init__(self, t):
        super().__init__()
        self.t, self.layer, self.last = t, nn.Linear(40, 3), nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.layer(x.view(len(x), -1, 40)).tanh()
        return self.last(hidden.mean(1))


@pytest.mark.parametrize("t", [1, 2])
def test_the_part_outside_the_bases_counts_with_the_damping_alone(t):
    """As for an example that none of the sampled labels, and no other example, speaks for."""
    torch.manual_seed(1)
    module, data = Step(Wide(t)).double(), both(40 * t, n=8)
    few, more = data["train"](), data["queries"]()
    attributor = Attributor(module, few)
    with attributor._session.open(attributor._queries(more)) as setting:
        curvature, diagonal = EKFAC(labels="empirical"), torch.tensor([DAMPING], dtype=torch.float64)
        gradients = setting.queries.gradients().blocks[0]  # of other examples than the Fisher's
        found = curvature.own_products(curvature.prepare(setting), gradients, setting, diagonal, (1, 2))
    expected = torch.zeros(2, len(gradients), dtype=torch.float64)
    right = seen(module, few)
    for name, of_layer in seen(module, more).items():
        fisher = kronecker.dense_fisher(*kronecker.factors(right[name])[:3])
        rows = kronecker.matrices(of_layer).flatten(1)
        solved = torch.linalg.solve(fisher + DAMPING * torch.eye(len(fisher), dtype=torch.float64), rows.T).T
        expected += torch.stack([(solved * rows).sum(1), solved.square().sum(1)])
    oracles.assert_scores(found, expected, 1e-9)


@pytest.mark.parametrize("lacking", ["out", "in"])
def test_a_basis_that_lacks_few_directions_is_completed(lacking):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    basis_out, basis_in = torch.linalg.qr(normal(6, 6)).Q, torch.linalg.qr(normal(5, 5)).Q
    basis_out, basis_in = (basis_out[:, :5], basis_in) if lacking == "out" else (basis_out, basis_in[:, :4])
    table = normal(basis_out.shape[1], basis_in.shape[1]).square() + 0.1
    inverse = KroneckerInverse(basis_out, basis_in, False, table, 7.0, ((6, 5),)).completed()
    basis = torch.kron(basis_out, basis_in)
    dense = basis @ table.flatten().diag() @ basis.T + 7.0 * (torch.eye(30).double() - basis @ basis.T)
    gradients = OuterProducts(normal(3, 1, 5), normal(3, 1, 6), (6, 5))
    rows, found = gradients.dense()[0].flatten(1), torch.zeros(3, 3, dtype=torch.float64)
    KroneckerPart(inverse, gradients, *inverse.rotated(gradients)).accumulate_dot(gradients, found)
    torch.testing.assert_close(found, rows @ dense @ rows.T)


@pytest.mark.parametrize("name", ["tables and norms", "tied", "one number"])
def test_layers_without_factors_have_their_diagonal(name, monkeypatch):
    module, train, _ = other(name)
    names = [n for n, _ in module.named_parameters()]
    monkeypatch.setattr(factors, "WIDEST", 1)  # no layer is factored
    right = oracles.rows(module, list(DataLoader(train, 1)), names)
    rows = torch.cat([oracles.flat(right[n]) for n in names], 1)
    expected = (rows.square() / (rows.square().mean(0) + DAMPING)).sum(1) / len(train)
    oracles.assert_scores(own(module, train), expected, 1e-9)


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_the_squared_length_under_a_large_damping(name):
    module, train, _ = other(name, two_groups=name == "groups")
    names = [n for n, _ in module.named_parameters()]
    expected = oracles.squared(oracles.rows(module, list(DataLoader(train, 1)), names))
    for curvature in (EKFAC(1e8, labels="empirical"), ExactGGN(1e8), Arnoldi(1e8, steps=5), ConjugateGradient(1e8)):
        oracles.assert_scores(own(module, train, curvature) * 1e8 * len(train), expected, 1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_the_diagonal_of_the_scores(name):
    module, train, _ = other(name)
    method = InfluenceFunction(EKFAC(DAMPING, tolerance=0))
    pairs = Attributor(module, train).score(method, "train").values
    oracles.assert_scores(Attributor(module, train, batch_size=5).self_influence(method).values, pairs.diagonal(), 1e-9)


@pytest.mark.parametrize("curvature", [ExactGGN(DAMPING), Arnoldi(DAMPING, steps=30)], ids=repr)
def test_dense_inverses_are_multiplied_row_by_row(curvature):
    module, train, _ = problem("mlp")
    names = [n for n, _ in module.named_parameters()]
    rows = oracles.rows(module, list(DataLoader(train, 1)), names)
    rows = torch.cat([oracles.flat(rows[n]) for n in names], 1)
    attributor = Attributor(module, train)
    with attributor._session.open() as setting:
        if isinstance(curvature, ExactGGN):
            matrix = curvature.prepare(setting).tensors["matrix"]
        else:
            kept = curvature.prepare(setting).tensors
            matrix = kept["vectors"].T @ kept["values"].diag() @ kept["vectors"]
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=torch.float64)
    expected = (torch.linalg.solve(damped, rows.T).T * rows).sum(1) / len(train)
    oracles.assert_scores(own(module, train, curvature, batch_size=5), expected, 1e-9)
