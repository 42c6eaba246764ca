"""EK-FAC: its identities, dense oracles for every kind of layer, labels, truncated tables, and what is refused."""

import oracles
import oracles_kronecker as kronecker
import pytest
import torch
from case import Items, Step, both, drawn, mlp
from fits import fit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import EKFAC, Attributor, GradientDot, Influence, InfluenceFunction, Trajectory
from lightning_influence.curvature import factors
from lightning_influence.gradients.queries import DenseQueries

torch.set_num_threads(1)
DAMPING = 0.03


class Spread(nn.Module):
    """A linear layer over positions, then the mean."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(5, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.last(self.layer(x).tanh().mean(1))


class Reused(nn.Module):
    """The same layer twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.layer(self.layer(x).tanh()))


def conv():
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False)),
        *(nn.Flatten(), nn.Linear(8, 3)),
    )


NETS = {
    "mlp": (mlp, (5,)),
    "convolutions": (conv, (2, 4, 4)),
    "positions": (Spread, (4, 5)),
    "reused": (Reused, (5,)),
}


def problem(name, n=12):
    net, shape = NETS[name]
    torch.manual_seed(1)
    module, data = Step(net()).double(), both(*shape, n=n)
    return module, data["train"](), data["queries"]()


def cross_entropy(module, one):
    return F.cross_entropy(module(one[0]), one[1])


def seen(module, data, loss=cross_entropy):
    return kronecker.layers(module, list(DataLoader(data, 1)), loss)


def scored(module, train, queries, curvature, **options):
    return Attributor(module, train, **options).score(InfluenceFunction(curvature), queries)


# ---- against dense algebra ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrected", [True, False], ids=["ekfac", "kfac"])
@pytest.mark.parametrize("name", NETS)
def test_scores_are_those_of_the_dense_inverse_of_every_layer(name, corrected):
    module, train, queries = problem(name)
    left, right = seen(module, queries), seen(module, train)
    expected = kronecker.score(right, right, left, DAMPING, corrected)
    curvature = EKFAC(DAMPING, corrected, "empirical", tolerance=0)
    oracles.assert_scores(scored(module, train, queries, curvature).values, expected, 1e-9)
    mean = Attributor(module, train).score(InfluenceFunction(curvature), queries, aggregate="mean").values
    oracles.assert_scores(mean, expected.mean(0, keepdim=True), 1e-9)


def test_more_examples_than_a_factor_is_wide():
    module, train, queries = problem("mlp", n=40)
    left, right = seen(module, queries), seen(module, train)
    curvature = EKFAC(1e-4, labels="empirical", tolerance=0)
    oracles.assert_scores(
        scored(module, train, queries, curvature).values, kronecker.score(right, right, left, 1e-4), 1e-9
    )


def test_one_example_has_an_exact_fisher():
    torch.manual_seed(0)
    module, data = Step(nn.Linear(5, 3)).double(), both(5, n=1)
    train, queries = data["train"](), data["queries"]()
    names = ["net.weight", "net.bias"]
    own, asked = (
        torch.cat([oracles.flat(r) for r in oracles.rows(module, list(DataLoader(d, 1)), names).values()], 1)
        for d in (train, queries)
    )
    fisher = own.T @ own + DAMPING * torch.eye(own.shape[1], dtype=torch.float64)
    found = scored(module, train, queries, EKFAC(DAMPING, labels="empirical")).values
    oracles.assert_scores(found, asked @ torch.linalg.solve(fisher, own.T), 1e-10)


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_fisher_of_linear_regression_is_its_hessian(outputs):
    torch.manual_seed(0)
    data = both(5, target="number")
    train, queries = data["train"](), data["queries"]()
    layer = nn.Linear(5, outputs)
    module = Step(layer, lambda z, y: 0.7 * (z - y[:, None]).square().sum(1).mean()).double()
    x, y = next(iter(DataLoader(train, len(train))))
    x = torch.cat([x, torch.ones(len(x), 1)], 1)

    def loss(flat):
        return 0.7 * (x @ flat.view(outputs, -1).T - y[:, None]).square().sum(1).mean()

    weight = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().flatten()
    hessian = torch.autograd.functional.hessian(loss, weight) + DAMPING * torch.eye(len(weight), dtype=torch.float64)
    left, right = (
        kronecker.matrices(
            seen(module, d, lambda m, one: 0.7 * (m(one[0]) - one[1][:, None]).square().sum())["net"]
        ).flatten(1)
        for d in (queries, train)
    )
    expected = left @ torch.linalg.solve(hessian, right.T) / len(train)
    oracles.assert_scores(scored(module, train, queries, EKFAC(DAMPING, labels="exact")).values, expected, 1e-10)


def test_exact_labels_are_the_expectation_over_the_models_own():
    module, train, queries = problem("mlp")
    pretended = {}
    for one in DataLoader(train, 1):
        p = module(one[0]).softmax(1).detach()[0]
        for k in range(3):

            def loss(module, one, k=k, p=p):
                return p[k].sqrt() * F.cross_entropy(module(one[0]), torch.tensor([k]))

            for name, parts in kronecker.layers(module, [one], loss).items():
                pretended.setdefault(name, []).extend(parts)
    expected = kronecker.score(pretended, seen(module, train), seen(module, queries), DAMPING, draws=3)
    for labels in ("exact", None):
        scores = scored(module, train, queries, EKFAC(DAMPING, labels=labels, tolerance=0))
        oracles.assert_scores(scores.values, expected, 1e-9)
        assert "EK-FAC of the Fisher: 2 layers approximated by Kronecker factors" in scores.notes


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_the_mean_square_of_the_gradients_is_the_trace(name, corrected):
    module, train, queries = problem(name)
    scores = scored(module, train, queries, EKFAC(corrected=corrected, labels="empirical"))
    names = [n for n, _ in module.named_parameters()]
    squares = oracles.squared(oracles.rows(module, list(DataLoader(train, 1)), names))
    size = sum(p.numel() for p in module.parameters())
    found = scores.figures["damping"] / 0.1 * size  # a tenth of the mean eigenvalue, where nothing was captured
    if corrected:
        assert found == pytest.approx(float(squares.mean()), rel=1e-10)
    else:  # a product of means: of the same size
        assert found == pytest.approx(float(squares.mean()), rel=0.9)


def test_measured_eigenvalues_are_nearer_to_the_fisher_than_products():
    module, train, _ = problem("positions")
    attributor, distance = Attributor(module, train), {}
    with attributor._session.open() as setting:
        for corrected in (True, False):
            curvature = EKFAC(corrected=corrected, labels="empirical")
            kept = curvature.prepare(setting).tensors
            for key, name in (("net.layer.weight|net.layer.bias", "net.layer"), ("net.last.weight", "net.last")):
                parts = (kept[f"{key}/{what}"] for what in ("basis_out", "basis_in", "eigenvalues"))
                distance[name, corrected] = kronecker.dense_fisher(*parts)
    for name, of_layer in seen(module, train).items():
        rows = kronecker.matrices(of_layer).flatten(1)
        fisher = rows.T @ rows / len(rows)
        near, far = (float((fisher - distance[name, corrected]).norm()) for corrected in (True, False))
        assert near < far


# ---- no parameter is left out ---------------------------------------------------------------------------------------


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.last = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.norm(self.table(x)).mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4)

    def forward(self, x):
        return (self.table(x).tanh().mean(1) @ self.table.weight.T)[:, :3]


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.tensor(0.7)), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.scale * x)


class Computed(nn.Module):
    """A table that is joined with one without entries, experts that take some tokens, and a masked weight."""

    def __init__(self):
        super().__init__()
        self.none, self.table = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.randn(6, 4))
        self.experts, self.last = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 3)

    def forward(self, x):
        h = F.embedding(x, torch.cat([self.none, self.table])).tanh()
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            out[x % 2 == e] = expert(h[x % 2 == e])
        return F.linear(out.mean(1), self.last.weight * self.last.weight.new_ones(3, 4).tril(), self.last.bias)


def grouped():
    return nn.Sequential(
        *(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Conv2d(6, 6, 2, groups=6), nn.BatchNorm2d(6)),
        *(nn.ConvTranspose2d(6, 2, 2), nn.Flatten(), nn.Linear(18, 3)),
    )


OTHERS = {
    "tables and norms": (Table, {"high": 6}, (3,)),
    "tied": (Tied, {"high": 6}, (3,)),
    "one number": (Scalar, {}, (5,)),
    "groups": (grouped, {}, (4, 4, 4)),
    "computed": (Computed, {"high": 6}, (3,)),
    "recurrent": (lambda: Last(nn.GRU(5, 4, batch_first=True)), {}, (3, 5)),
    "positions": (Spread, {}, (4, 5)),
}


class Last(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.last = body, nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.body(x)[0][:, -1])


def other(name, two_groups=False):
    net, options, shape = OTHERS[name]
    torch.manual_seed(1)
    data = both(*shape, **options)
    return Step(net(), two_groups=two_groups).double(), data["train"](), data["queries"]()


@pytest.mark.parametrize("name", OTHERS)
def test_under_a_large_damping_every_parameter_counts_as_in_the_inner_product(name):
    module, train, queries = other(name)
    expected = Attributor(module, train).score(GradientDot(), queries).values
    damping = 1e7
    for curvature in (EKFAC(damping, labels="empirical"), EKFAC(damping, False, "empirical")):
        found = scored(module, train, queries, curvature).values * damping * len(train)
        oracles.assert_scores(found, expected, 1e-5)


def test_tables_and_norms_have_their_diagonal():
    module, train, queries = other("tables and norms")
    names = [n for n, _ in module.named_parameters()]
    left, right = (oracles.rows(module, list(DataLoader(d, 1)), names) for d in (queries, train))
    expected = torch.zeros(len(queries), len(train), dtype=torch.float64)
    for name in ("net.table.weight", "net.norm.weight", "net.norm.bias"):
        table = oracles.flat(right[name]).square().mean(0) + DAMPING
        expected += oracles.flat(left[name]) / table @ oracles.flat(right[name]).T / len(train)
    heads = ({"net.last": seen(module, d)["net.last"]} for d in (train, queries))
    train_head, query_head = heads
    expected += kronecker.score(train_head, train_head, query_head, DAMPING)
    scores = scored(module, train, queries, EKFAC(DAMPING, labels="empirical", tolerance=0))
    oracles.assert_scores(scores.values, expected, 1e-9)
    assert any("with a diagonal Fisher: net.table.weight, net.norm.weight, net.norm.bias" in n for n in scores.notes)
    mean = Attributor(module, train).score(
        InfluenceFunction(EKFAC(DAMPING, labels="empirical")), queries, aggregate="mean"
    )
    oracles.assert_scores(mean.values, expected.mean(0, keepdim=True), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tables and norms", "groups", "positions"])
@pytest.mark.parametrize("normalize", [None, "relatif", "relatif-loss"])
def test_self_influence_is_the_diagonal(name, normalize):
    module, train, _ = other(name)
    method = InfluenceFunction(EKFAC(DAMPING, tolerance=0), normalize=normalize)
    pairs = Attributor(module, train).score(method, train).values
    torch.testing.assert_close(Attributor(module, train).self_influence(method).values, pairs.diagonal())


def test_relatif_divides_by_the_length_of_the_change():
    module, train, queries = problem("mlp")  # 12 examples: some directions of the factors see no gradient
    right, left = seen(module, train), seen(module, queries)
    squares, plain = 0.0, 0.0
    for name, of_layer in right.items():
        fisher = kronecker.dense_fisher(*kronecker.factors(of_layer)[:3])
        rows = kronecker.matrices(of_layer).flatten(1)
        solved = torch.linalg.solve(fisher + DAMPING * torch.eye(len(fisher), dtype=torch.float64), rows.T)
        squares, plain = squares + solved.square().sum(0), plain + kronecker.matrices(left[name]).flatten(1) @ solved
    method = InfluenceFunction(EKFAC(DAMPING, labels="empirical"), normalize="relatif")
    found = Attributor(module, train).score(method, queries).values
    oracles.assert_scores(found, plain / squares.sqrt(), 1e-9)


@pytest.mark.parametrize("name", ["mlp", "positions"])
def test_a_factor_that_is_too_wide_has_its_diagonal(name, monkeypatch):
    monkeypatch.setattr(factors, "WIDEST", 4)
    module, train, queries = problem(name)
    names = [n for n, _ in module.named_parameters()]
    left, right = (oracles.rows(module, list(DataLoader(d, 1)), names) for d in (queries, train))
    expected = sum(
        oracles.flat(left[n]) / (oracles.flat(right[n]).square().mean(0) + DAMPING) @ oracles.flat(right[n]).T
        for n in names
        if name == "mlp" or "layer" in n
    )
    if name == "positions":
        head, asked = ({"net.last": seen(module, d)["net.last"]} for d in (train, queries))
        expected = expected + kronecker.score(head, head, asked, DAMPING) * len(train)
    scores = scored(module, train, queries, EKFAC(DAMPING, labels="empirical"))
    oracles.assert_scores(scores.values, expected / len(train), 1e-9)


@pytest.mark.parametrize("name", ["mlp", "tables and norms"])
def test_directions_as_factors_are_those_written_out(name):
    module, train, queries = problem(name) if name in NETS else other(name)
    attributor, diagonal = Attributor(module, train), torch.tensor([DAMPING], dtype=torch.float64)
    with attributor._session.open(attributor._queries(queries)) as setting:
        asked = setting.queries[0:4]
        curvature = EKFAC(labels="empirical")
        solved = curvature.solve(curvature.prepare(setting), asked.gradients(), setting, diagonal)
        block = next(setting.final().train())[1]
        plain = DenseQueries(solved.dense(), {})
        vector = {n: torch.randn(p.shape, dtype=p.dtype) for n, p in module.named_parameters()}
        torch.testing.assert_close(solved.dot(block), plain.dot(block))
        torch.testing.assert_close(solved.norm2(), plain.norm2())
        torch.testing.assert_close(solved.times(vector), plain.times(vector))
        torch.testing.assert_close(solved.normalized("cosine").dot(block), plain.normalized("cosine").dot(block))
        torch.testing.assert_close(solved.diagonal(block.slice(slice(4))), plain.dot(block.slice(slice(4))).diagonal())
        torch.testing.assert_close(solved.dot(block.per_parameter()), plain.dot(block))
        factor = torch.arange(4, dtype=torch.float64)
        for part in solved.joint.parts.values():
            written = part.dense()
            for found, rows in zip(part.scaled(factor).slice(slice(1, 4)).dense(), written, strict=True):
                torch.testing.assert_close(found, (rows.flatten(1) * factor[:, None]).view_as(rows)[1:4])
            for found, rows in zip(part.total(), written, strict=True):
                torch.testing.assert_close(found, rows.sum(0))
            assert part.shapes() == tuple(rows.shape[1:] for rows in written)
            assert bool(part.finite().all())


def test_what_was_prepared_stays_with_the_trajectory(tmp_path):
    torch.manual_seed(0)
    module, data = Step(mlp()).double(), both(5, n=20)
    train, queries = data["train"](), data["queries"]()
    method = InfluenceFunction(EKFAC(tolerance=0))
    influence = Influence([method], queries=queries, dirpath=tmp_path)
    fit(module, DataLoader(train, 5), influence, max_epochs=2)
    attributor = Attributor(module, train, Trajectory.load(tmp_path))
    kept = list(attributor.trajectory.path.glob("curvature/EKFAC-*"))
    assert len(kept) == 1
    written = kept[0].stat().st_mtime_ns
    torch.testing.assert_close(attributor.score(method, queries).values, influence.scores["InfluenceFunction"].values)
    attributor.score(InfluenceFunction(EKFAC(DAMPING)), queries)  # neither damping nor tolerance is prepared
    assert [p.stat().st_mtime_ns for p in attributor.trajectory.path.glob("curvature/EKFAC-*")] == [written]


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_sampled_labels_are_the_same_in_two_runs_and_in_blocks_of_any_size():
    module, train, queries = problem("mlp")
    first = scored(module, train, queries, EKFAC(DAMPING, labels="sampled")).values
    for options in ({}, {"batch_size": 1}, {"batch_size": 5}):
        torch.manual_seed(7)
        found = scored(module, train, queries, EKFAC(DAMPING, labels="sampled"), **options).values
        torch.testing.assert_close(found, first)
    assert not torch.allclose(scored(module, train, queries, EKFAC(DAMPING, labels="sampled", seed=1)).values, first)


LOSSES = {
    "softmax": (3, "class", F.cross_entropy),
    "sigmoid": (2, "class", lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3)[:, :2].to(z))),
    "squared": (1, "number", lambda z, y: F.mse_loss(z[:, 0], y)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOSSES)
def test_the_mean_of_samples_is_the_expectation(kind):
    classes, target, loss = LOSSES[kind]
    torch.manual_seed(0)
    data = both(3, target=target, n=300)
    train, queries = data["train"](), data["queries"]()
    module = Step(nn.Linear(3, classes), loss).double()

    def trace(curvature):
        return scored(module, train, queries, curvature).figures["damping"]

    exact = trace(EKFAC(labels="exact"))
    drawn_ones = torch.tensor([trace(EKFAC(labels="sampled", seed=seed)) for seed in range(6)])
    assert float(drawn_ones.std()) > 0
    assert abs(float(drawn_ones.mean()) / exact - 1) < 0.12


def test_without_a_head_to_draw_from_the_data_give_the_labels():
    torch.manual_seed(0)
    data = both(2, 4, 4)
    module = Step(nn.Sequential(nn.Conv2d(2, 3, 4), nn.Flatten())).double()
    scores = scored(module, data["train"](), data["queries"](), EKFAC(DAMPING))
    assert "EK-FAC of the empirical Fisher, since the model has no linear head to sample labels from: 1 layer " in (
        " ".join(scores.notes)
    )
    with pytest.raises(ValueError, match="Expected a model that ends in a linear layer"):
        scored(module, data["train"](), data["queries"](), EKFAC(DAMPING, labels="sampled"))


# ---- inverse eigenvalues at low rank --------------------------------------------------------------------------------


def wide(n=150):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 3))
    draw = drawn(4)
    x = torch.randn(n + 20, 60, generator=draw, dtype=torch.float64) / torch.arange(1, 61)
    y = (x[:, :3] + 0.1 * torch.randn(n + 20, 3, generator=draw)).argmax(1)
    items = list(zip(x, y, strict=True))
    return Step(net).double(), Items(items[:n]), Items(items[n:])


@pytest.mark.parametrize("tolerance", [0.1, 0.01])
def test_the_error_of_the_scores_stays_within_the_tolerance(tolerance):
    module, train, queries = wide()
    exact = scored(module, train, queries, EKFAC(labels="empirical", tolerance=0))
    cut = scored(module, train, queries, EKFAC(labels="empirical", tolerance=tolerance))
    error = (cut.values - exact.values).norm(dim=1) / exact.values.norm(dim=1)
    assert 0 < float(error.square().mean().sqrt()) < 1.5 * tolerance  # measured on some pairs, seen on all
    assert 0 < cut.figures["score_error"] <= tolerance
    assert any(f"(`tolerance={tolerance:g}`; 0 is exact)" in note for note in cut.notes)
    assert not any("tolerance" in note for note in exact.notes)


def test_where_few_products_do_not_do_the_table_stays():
    module, train, queries = wide()
    exact = scored(module, train, queries, EKFAC(labels="empirical", tolerance=0)).values
    cut = scored(module, train, queries, EKFAC(labels="empirical", tolerance=1e-12))
    torch.testing.assert_close(cut.values, exact)
    assert cut.figures["score_error"] <= 1e-12


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"labels": "true"}, "Expected `labels` to be one of None, 'sampled', 'exact', 'empirical', got 'true'"),
        ({"tolerance": -0.1}, "Expected `tolerance` to be a number of at least 0 and below 1, got -0.1"),
        ({"tolerance": 1.0}, "Expected `tolerance` to be a number of at least 0 and below 1, got 1.0"),
        ({"tolerance": float("nan")}, "Expected `tolerance` to be a number of at least 0 and below 1, got nan"),
        ({"tolerance": False}, "Expected `tolerance` to be a number of at least 0 and below 1, got False"),
        ({"damping": -1.0}, "Expected `damping` to be a finite number of at least 0"),
    ],
)
def test_bad_settings_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        EKFAC(**arguments)


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_a_singular_fisher_needs_damping(name):
    module, train, queries = problem(name)
    with pytest.raises(ValueError, match=r"Expected `damping` to be positive where the Fisher of .* singular, got 0"):
        scored(module, train, queries, EKFAC(0.0, labels="empirical"))


class Differentiated(Step):
    """A penalty on the derivatives of the outputs by the inputs."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        out = self.net(x)
        (slope,) = torch.autograd.grad(out.logsumexp(1).sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1]) + 0.1 * slope.square().sum(1).mean()


def test_a_head_that_the_step_differentiates_leaves_the_empirical_fisher():
    data = both(5)
    module = Differentiated(mlp()).double()
    attributor = Attributor(module, DataLoader(data["train"](), 3))
    notes = attributor.score(InfluenceFunction(EKFAC(damping=0.1)), data["queries"]()).notes
    assert any("empirical Fisher" in note for note in notes)
