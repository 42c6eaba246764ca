"""Influence functions against exact leave-one-out on convex models, and their options against dense algebra."""

import oracles_curvature as dense
import pytest
import torch
from case import Items, Step, both, mlp
from scipy.stats import pearsonr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from traced import Still, still

from lightning_influence import (
    EKFAC,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    ExactGGN,
    ExactHessian,
    GradientDot,
    InfluenceFunction,
    LiSSA,
    MissingEvidence,
    TracInCP,
)

torch.set_num_threads(1)
DATA = both(5)
NAMES = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
CURVATURES = [ExactHessian(0.0), ExactGGN(0.0), ConjugateGradient(0.0, tolerance=1e-12)]


def batches(items):
    return [[part[None] for part in items[i]] for i in range(len(items))]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- ridge regression: leave-one-out in closed form -----------------------------------------------------------------

DECAY = 0.1


def ridge(tmp_path, n=160, width=5):
    """Data, the module at its optimum under weight decay, and its trajectory."""
    x, noise = normal(0, n, width), normal(1, n)
    y = x @ normal(2, width) + 2 * noise
    x[0] *= 6  # one of high leverage
    module = Step(nn.Linear(width, 1, bias=False), lambda z, t: F.mse_loss(z[:, 0], t)).double()
    w = ridge_fit(x, y, torch.ones(n, dtype=torch.float64))
    with torch.no_grad():
        module.net.weight.copy_(w[None])
    trajectory = still(module, tmp_path, {"weight_decay": DECAY, "momentum": 0, "dampening": 0})
    return x, y, module, w, Attributor(module, TensorDataset(x, y), trajectory)


def ridge_fit(x, y, weights, divisor=None, decay=DECAY):
    n = len(x) if divisor is None else divisor
    curvature = 2 / n * (x.T * weights) @ x + decay * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.solve(curvature, 2 / n * (x.T * weights) @ y)


def without(n, i):
    weights = torch.ones(n, dtype=torch.float64)
    weights[i] = 0
    return weights


@pytest.mark.parametrize("curvature", CURVATURES, ids=repr)
def test_on_ridge_regression_scores_are_leave_one_out_with_slope_one_minus_leverage(tmp_path, curvature):
    x, y, _, w, attributor = ridge(tmp_path)
    asked = normal(5, 30, 5)
    answers = asked @ w + 1 + normal(6, 30).abs()  # where a query fits, its loss has no first order
    found = attributor.score(InfluenceFunction(curvature), TensorDataset(asked, answers)).values
    n = len(x)
    moved = torch.stack([ridge_fit(x, y, without(n, i)) for i in range(n)]) - w  # [train, width]
    linear = 2 * (asked @ w - answers)[:, None] * (asked @ moved.T)  # the query's loss to first order in the weights
    curvature_matrix = x.T @ x + n * DECAY / 2 * torch.eye(5, dtype=torch.float64)
    leverage = torch.einsum("ni,ij,nj->n", x, torch.linalg.inv(curvature_matrix), x)
    assert float(leverage.max()) > 0.2
    torch.testing.assert_close(found, linear * (1 - leverage), rtol=1e-8, atol=1e-10)
    exact = (asked @ (w + moved).T - answers[:, None]).square() - (asked @ w - answers).square()[:, None]
    ordinary = leverage < 0.15
    for q in range(30):
        assert pearsonr(found[q, ordinary], exact[q, ordinary])[0] > 0.99
    slope = float((found[:, ordinary] * exact[:, ordinary]).sum() / exact[:, ordinary].square().sum())
    assert slope == pytest.approx(1 - float(leverage[ordinary].mean()), abs=0.03)


@pytest.mark.parametrize("removal", ["downweight", "renormalize"])
@pytest.mark.parametrize("curvature", [ExactGGN(0.0), ExactHessian(0.0)], ids=repr)
def test_the_newton_correction_is_sherman_morrison_and_exact_on_ridge_regression(tmp_path, curvature, removal):
    x, y, _, w, attributor = ridge(tmp_path)
    asked, answers = normal(5, 30, 5), normal(6, 30)
    method = InfluenceFunction(curvature, correction="newton", removal=removal)
    found = attributor.score(method, TensorDataset(asked, answers)).values
    n = len(x)
    divisor = n if removal == "downweight" else n - 1
    moved = torch.stack([ridge_fit(x, y, without(n, i), divisor) for i in range(n)]) - w
    expected = 2 * (asked @ w - answers)[:, None] * (asked @ moved.T)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    own = attributor.self_influence(method).values
    itself = attributor.score(method, "train").values.diagonal()
    torch.testing.assert_close(own, itself, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("removal", ["downweight", "renormalize"])
def test_removal_says_whether_weight_decay_keeps_its_strength(tmp_path, removal):
    """To first order: the derivative of the optimum by the example's weight, by central differences."""
    x, y, _, w, attributor = ridge(tmp_path)
    asked, answers = normal(5, 3, 5), normal(6, 3)
    found = attributor.score(InfluenceFunction(ExactGGN(0.0), removal), TensorDataset(asked, answers)).values
    n, step = len(x), 1e-5
    moved = []
    for i in range(n):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(n, dtype=torch.float64)
            weights[i] -= sign * step
            divisor = n if removal == "downweight" else float(weights.sum())
            ends.append(ridge_fit(x, y, weights, divisor))
        moved.append((ends[0] - ends[1]) / (2 * step))
    expected = 2 * (asked @ w - answers)[:, None] * (asked @ torch.stack(moved).T)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    for curvature in (ExactGGN(0.0), EKFAC(0.1)):
        method = InfluenceFunction(curvature, removal)
        pairs = attributor.score(method, "train").values.diagonal()
        torch.testing.assert_close(attributor.self_influence(method).values, pairs, rtol=1e-9, atol=1e-12)


# ---- softmax regression ----------------------------------------------------------------------------------------------


def digits(n, queries=60):
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x / 16.0, dtype=torch.float64)[order], torch.tensor(y, dtype=torch.int64)[order]
    return x[:n], y[:n], x[n : n + queries], y[n : n + queries]


class Softmax:
    """Regression on classes without a bias, in closed form but for its minimum."""

    def __init__(self, x, y, decay):
        self.x, self.decay, self.target = x, decay, F.one_hot(y, 10).double()
        self.weights = torch.ones(len(x), dtype=torch.float64)

    def gradient(self, w):
        off = (self.x @ w.view(10, -1).T).softmax(1) - self.target
        return ((self.weights[:, None] * off).T @ self.x / len(self.x)).flatten() + self.decay * w

    def hessian(self, w):
        p = (self.x @ w.view(10, -1).T).softmax(1)
        bend = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        found = torch.einsum("ncd,ni,nj->cidj", bend, self.x, self.x) / len(self.x)
        return found.reshape(len(w), len(w)) + self.decay * torch.eye(len(w), dtype=torch.float64)


@pytest.mark.slow
def test_on_logistic_regression_of_digits_scores_agree_with_exact_refits(tmp_path):
    n, decay = 400, 0.01
    x, y, asked, answers = digits(n, queries=30)
    problem = Softmax(x, y, decay)
    w = dense.minimise(problem.gradient, problem.hessian, torch.zeros(640))
    module = Step(nn.Linear(64, 10, bias=False)).double()
    with torch.no_grad():
        module.net.weight.copy_(w.view(10, 64))
    trajectory = still(module, tmp_path, {"weight_decay": decay, "momentum": 0, "dampening": 0})
    attributor = Attributor(module, TensorDataset(x, y), trajectory)
    queries = TensorDataset(asked, answers)
    plain = attributor.score(InfluenceFunction(ExactHessian(0.0)), queries).values
    newton = attributor.score(InfluenceFunction(ExactHessian(0.0), correction="newton"), queries).values

    def losses(flat):
        return F.cross_entropy(asked @ flat.view(10, 64).T, answers, reduction="none")

    near, exact, left_out = torch.linalg.cholesky(problem.hessian(w)), [], range(0, n, 16)
    for i in left_out:
        problem.weights = without(n, i)
        exact.append(losses(dense.minimise(problem.gradient, near, w, fixed=True)) - losses(w))
    exact = torch.stack(exact, 1)
    found, closer = plain[:, left_out], newton[:, left_out]
    for q in range(len(asked)):
        assert pearsonr(found[q], exact[q])[0] > 0.95
    assert pearsonr(found.flatten(), exact.flatten())[0] > 0.95
    slope = lambda a: float((a * exact).sum() / exact.square().sum())  # noqa: E731
    assert abs(slope(closer) - 1) < 0.05
    assert slope(found) < slope(closer)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_newton_correction_of_a_softmax_head_is_one_dense_solve_an_example(tmp_path, bias, renormalize):
    torch.manual_seed(0)
    module = Step(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=bias))).double()
    names = ["net.2.weight", "net.2.bias"][: 1 + bias]
    trajectory = still(module, tmp_path, {"weight_decay": 0.05, "momentum": 0, "dampening": 0})
    train, queries = batches(DATA["train"]()), batches(DATA["queries"]())
    attributor = Attributor(module, DATA["train"](), trajectory, batch_size=3, parameters="net.2.*")
    removal = "renormalize" if renormalize else "downweight"
    method = InfluenceFunction(ExactGGN(0.02), removal=removal, correction="newton")
    found = attributor.score(method, DATA["queries"]()).values
    each = dense.each_ggn(module, train, names, lambda m, one: m.net(one[0]), dense.softmax_bend)
    weights = torch.cat([dict(module.named_parameters())[name].detach().flatten() for name in names])
    left, right = (dense.gradients(module, ones, names) for ones in (queries, train))
    steps = dense.newton_step(right, each.mean(0), each, 0.05, 0.02, weights, renormalize)
    expected = left @ steps.T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    uncorrected = attributor.score(InfluenceFunction(ExactGGN(0.02), removal), DATA["queries"]()).values
    assert float((uncorrected - expected).abs().max()) > 1e-2 * float(expected.abs().max())


def test_the_newton_correction_is_refused_where_the_model_is_not_linear():
    with pytest.raises(ValueError, match=r"linear in the scored parameters.*Pass `parameters='head"):
        Attributor(plain_model(), DATA["train"]()).score(
            InfluenceFunction(ExactGGN(), correction="newton"), DATA["queries"]()
        )


# ---- options against dense algebra --------------------------------------------------------------------------------


def plain_model():
    torch.manual_seed(0)
    return Step(mlp()).double()


def rows(module, which):
    return dense.gradients(module, batches(DATA[which]()), NAMES)


def inverse(module, diagonal, state=None):
    each = dense.each_ggn(
        module, batches(DATA["train"]()), NAMES, lambda m, one: m.net(one[0]), dense.softmax_bend, state
    )
    return torch.linalg.inv(each.mean(0) + diagonal * torch.eye(each.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("normalize", ["relatif", "relatif-loss"])
@pytest.mark.parametrize(
    ("curvature", "copies"),
    [
        (ExactGGN(0.1), 3),
        pytest.param(ConjugateGradient(0.1, tolerance=1e-12), 6, marks=pytest.mark.slow),
    ],
)
def test_relatif_divides_by_what_leaving_the_example_out_changes_anyway(monkeypatch, normalize, curvature, copies):
    monkeypatch.setattr("lightning_influence.curvature.curvature._BYTES", 8 * 57 * copies * 3)  # three at once
    module = plain_model()
    found = Attributor(module, DATA["train"](), batch_size=5)
    left, right, inv = rows(module, "queries"), rows(module, "train"), inverse(module, 0.1)
    if normalize == "relatif":
        length = torch.linalg.vector_norm(right @ inv, dim=1)
    else:
        length = ((right @ inv) * right).sum(1).sqrt()
    method = InfluenceFunction(curvature, normalize=normalize)
    scores = found.score(method, DATA["queries"]())
    torch.testing.assert_close(scores.values, left @ inv @ right.T / length, rtol=1e-8, atol=1e-10)
    assert scores.units == "arbitrary"
    own = found.self_influence(method).values
    torch.testing.assert_close(own, ((right @ inv) * right).sum(1) / length, rtol=1e-8, atol=1e-10)


def test_scores_at_several_checkpoints_are_averaged(tmp_path):
    module = Still(mlp(), F.cross_entropy, decay=0.01, rate=0.2).double()
    trajectory = module.trained(DATA["train"](), tmp_path, batch_size=4, epochs=3)
    attributor = Attributor(module, DATA["train"](), trajectory)
    method = InfluenceFunction(ExactGGN(), checkpoints=(1, 2, 3))
    found = attributor.score(method, DATA["queries"]())
    expected = 0.0
    for position in (1, 2, 3):
        state = trajectory.checkpoints[position].load().parameters
        twin = dense.quiet_copy(module, state)
        inv = inverse(twin, 0.01 + 1 / (0.2 * 2 * position))
        expected = expected + rows(twin, "queries") @ inv @ rows(twin, "train").T / 8 / 3
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    assert found.checkpoints == tuple(trajectory.checkpoints[i].step for i in (1, 2, 3))
    with pytest.raises(MissingEvidence, match="Expected a trajectory"):
        Attributor(module, DATA["train"]()).score(method, DATA["queries"]())


@pytest.mark.parametrize(
    "curvature",
    [ExactHessian(0.5), ExactGGN(0.5), ConjugateGradient(0.5, matrix="hessian", tolerance=1e-12)],
    ids=repr,
)
def test_a_group_is_estimated_to_second_order(curvature):
    module, group = plain_model(), [6, 1, 3]
    n, train = 8, batches(DATA["train"]())
    some = [train[i] for i in group]
    if curvature.matrix == "hessian":
        whole, own = dense.hessian(module, train, NAMES), 3 * dense.hessian(module, some, NAMES)
    else:
        each = dense.each_ggn(module, train, NAMES, lambda m, one: m.net(one[0]), dense.softmax_bend)
        whole, own = each.mean(0), each[group].sum(0)
    inv = torch.linalg.inv(whole + 0.5 * torch.eye(57, dtype=torch.float64))
    pull = rows(module, "train")[group].sum(0) / n
    expected = rows(module, "queries") @ (inv @ pull + inv @ own @ inv @ pull / n)
    attributor = Attributor(module, DATA["train"]())
    found = attributor.group(InfluenceFunction(curvature), group, DATA["queries"]())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    first = attributor.score(InfluenceFunction(curvature), DATA["queries"]()).group(group)
    assert float((found - first.double()).abs().max()) > 1e-2 * float(expected.abs().max())


def test_a_group_on_ridge_regression_is_closer_to_the_truth_than_the_sum(tmp_path):
    x, y, _, w, attributor = ridge(tmp_path)
    asked, answers = normal(5, 30, 5), normal(6, 30)
    group = list(range(1, 13))
    weights = torch.ones(160, dtype=torch.float64)
    weights[group] = 0
    exact = 2 * (asked @ w - answers) * (asked @ (ridge_fit(x, y, weights) - w))
    queries = TensorDataset(asked, answers)
    second = attributor.group(InfluenceFunction(ExactHessian(0.0)), group, queries)
    first = attributor.group(InfluenceFunction(ExactHessian(0.0), "renormalize"), group, queries)  # a sum
    summed = attributor.score(InfluenceFunction(ExactHessian(0.0), "renormalize"), queries).group(group)
    torch.testing.assert_close(first, summed.double())
    plain = attributor.score(InfluenceFunction(ExactHessian(0.0)), queries).group(group).double()
    error = lambda found: float((found - exact).norm() / exact.norm())  # noqa: E731
    assert error(second) < 0.5 * error(plain)


def test_queries_that_count_as_one_are_their_mean():
    module = plain_model()
    attributor = Attributor(module, DATA["train"]())
    method = InfluenceFunction(ExactGGN(0.1))
    whole = attributor.score(method, DATA["queries"]()).values.mean(0, keepdim=True)
    mean = attributor.score(method, DATA["queries"](), aggregate="mean").values
    torch.testing.assert_close(mean, whole)


def test_a_loss_without_curvature_leaves_gradient_dot_over_the_damping():
    """Absolute errors bend nowhere: their Gauss-Newton matrix is zero."""
    torch.manual_seed(0)
    module = Step(nn.Linear(5, 1), lambda z, y: F.l1_loss(z[:, 0], y)).double()
    data = TensorDataset(normal(1, 9, 5), normal(2, 9))
    attributor = Attributor(module, data)
    found = attributor.score(InfluenceFunction(ExactGGN(0.5)), data).values
    torch.testing.assert_close(found, attributor.score(GradientDot(), data).values / 0.5 / 9)


# ---- measurements ---------------------------------------------------------------------------------------------------


def margin(module, batch):
    x, y = batch
    z = module(x)
    return z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)


def squared_error(module, batch):
    import torchmetrics.functional as metrics

    x, y = batch
    return torch.stack([metrics.mean_squared_error(z, t) for z, t in zip(module(x), F.one_hot(y, 3).double())])


@pytest.mark.parametrize("measure", [margin, squared_error], ids=["margin", "squared error"])
@pytest.mark.parametrize("better", [False, True])
def test_influence_on_any_measurement_of_the_query(tmp_path, measure, better):
    module = Still(mlp(), F.cross_entropy, decay=0.01, rate=0.2).double()
    trajectory = module.trained(DATA["train"](), tmp_path, batch_size=4, epochs=1)
    attributor = Attributor(module, DATA["train"](), trajectory)
    options = {"measurement": measure, "higher_is_better": better}
    left = dense.gradients(module, batches(DATA["queries"]()), NAMES, measure) * (-1 if better else 1)
    right, inv = rows(module, "train"), inverse(module, 0.01 + 1 / 0.4)
    found = attributor.score(InfluenceFunction(ExactGGN()), DATA["queries"](), **options).values
    torch.testing.assert_close(found, left @ inv @ right.T / 8, rtol=1e-9, atol=1e-12)
    traced = attributor.score(TracInCP(checkpoints=(-1,)), DATA["queries"](), **options).values
    torch.testing.assert_close(traced, left @ right.T * 0.4 / 8, rtol=1e-9, atol=1e-12)
    plain = attributor.score(GradientDot(), DATA["queries"](), **options).values
    torch.testing.assert_close(plain, left @ right.T, rtol=1e-9, atol=1e-12)


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: InfluenceFunction(ExactGGN), TypeError, r"Write `InfluenceFunction\(ExactGGN\(\)\)`"),
        (lambda: InfluenceFunction("EKFAC"), TypeError, "`curvature` to be a Curvature such as `EKFAC"),
        (lambda: InfluenceFunction(ExactGGN(), removal="drop"), ValueError, "`removal` to be one of 'downweight'"),
        (lambda: InfluenceFunction(ExactGGN(), correction="leverage"), ValueError, "`correction` to be one of"),
        (lambda: InfluenceFunction(ExactGGN(), normalize="cosine"), ValueError, "`normalize` to be one of"),
        (lambda: InfluenceFunction(LiSSA(), correction="newton"), ValueError, "`ExactGGN.*with `correction='newton'`"),
        (
            lambda: InfluenceFunction(ExactGGN(), "renormalize", normalize="relatif"),
            ValueError,
            "`removal='downweight'` with `normalize='relatif'`, got None and 'renormalize'",
        ),
    ],
)
def test_settings_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_record_names_the_curvature_and_its_settings():
    found = Attributor(plain_model(), DATA["train"]()).score(
        InfluenceFunction(Arnoldi(0.5, steps=9)), DATA["queries"]()
    )
    expected = {"name": "Arnoldi", "damping": 0.5, "matrix": "ggn", "seed": 0, "steps": 9}
    assert expected.items() <= found.settings["curvature"].items()
    assert found.units == "arbitrary"  # nothing tells whether 0.5 is what the fit implies


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_named():
    items = DATA["train"]().items
    items[2] = (items[2][0] * float("nan"), items[2][1])
    good, bad = DATA["train"](), Items(items)
    for curvature in (ExactGGN(0.1), ConjugateGradient(0.1), LiSSA(0.1), Arnoldi(0.1)):
        with pytest.raises(
            ValueError, match=r"Expected finite gradients, got NaN or infinity for training examples \[2\]"
        ):
            Attributor(plain_model(), bad).score(InfluenceFunction(curvature), DATA["queries"]())
        with pytest.raises(ValueError, match=r"Expected finite gradients, got NaN or infinity for queries \[2\]"):
            Attributor(plain_model(), good).score(InfluenceFunction(curvature), bad)


# ---- real networks ------------------------------------------------------------------------------------------------


def digits_network(tmp_path, **options):
    """An MLP of 2,410 parameters fitted to the digits by momentum SGD in float32."""
    x, y, asked, answers = digits(1000, queries=20)
    torch.manual_seed(0)
    module = Momentum(mlp(64, 32, 10), F.cross_entropy, decay=1e-3, rate=0.05)
    data = TensorDataset(x.float(), y)
    trajectory = module.trained(data, tmp_path, batch_size=50, epochs=12, every_n_epochs=12)
    return Attributor(module, data, trajectory), TensorDataset(asked.float(), answers)


class Momentum(Still):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, weight_decay=self.decay)


@pytest.mark.slow
def test_lissa_is_finite_and_within_a_percent_of_conjugate_gradients_on_the_digits_network(tmp_path):
    attributor, queries = digits_network(tmp_path)
    exact = attributor.score(InfluenceFunction(ConjugateGradient()), queries)
    series = attributor.score(InfluenceFunction(LiSSA()), queries)
    assert series.values.isfinite().all()
    size = torch.linalg.vector_norm(exact.values, dim=1)
    assert float((torch.linalg.vector_norm(series.values - exact.values, dim=1) / size).max()) < 0.01
    assert not any("did not converge" in note for note in (*series.notes, *exact.notes))
    assert series.figures["damping"] == exact.figures["damping"] == pytest.approx(1 / (12 * 20 * 0.05 / 0.1), rel=1e-6)
    dense_scores = attributor.score(InfluenceFunction(ExactGGN()), queries).values
    assert float((torch.linalg.vector_norm(dense_scores - exact.values, dim=1) / size).max()) < 1e-3


@pytest.mark.slow
def test_on_a_badly_conditioned_network_lissa_says_so(tmp_path):
    attributor, queries = digits_network(tmp_path)
    with pytest.warns(UserWarning, match=r"did not converge: residual .* Raise `depth=`"):
        found = attributor.score(InfluenceFunction(LiSSA(damping=1e-7, depth=100)), queries)
    assert found.values.isfinite().all()
    assert any("did not converge" in note for note in found.notes)
