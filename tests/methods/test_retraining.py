"""Retraining methods against loops, normal equations, all orders and all subsets."""

import math

import oracles_retraining as oracles
import pytest
import torch
from refit.ridge import DECAY, WIDTH, ClosedRefit, Ridge, Solved, attributor, data, make_loader, make_trainer
from torch.utils.data import Subset, TensorDataset

from lightning_influence import (
    Attributor,
    DataShapley,
    Downsampling,
    GradientDot,
    KNNShapley,
    LeaveOneOut,
    MissingEvidence,
    Refit,
)
from lightning_influence.methods.downsampling import with_and_without
from lightning_influence.methods.knn_shapley import knn_shapley
from lightning_influence.numerics import subsets

TEST = data(4, seed=1)


def closed(folder, train, **options):
    refit = ClosedRefit(folder, train, **options)
    return attributor(train, refit), refit.way


def losses_on(train, keep_divisor=True, asked=TEST):
    (x, y), (asked_x, asked_y) = train.tensors, asked.tensors
    return lambda ids: oracles.ridge_losses(x, y, ids, asked_x, asked_y, DECAY, len(x) if keep_divisor else None)


def value_on(train, empty=None):
    """Minus the loss; of nothing, that of zero weights or a given one."""
    losses, (_, asked_y) = losses_on(train), TEST.tensors
    nothing = asked_y**2 / 2 if empty is None else torch.full_like(asked_y, empty)
    return lambda ids: -(losses(ids) if len(ids) else nothing)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, equal_nan=True)


# ---- leave-one-out ---------------------------------------------------------------------------------------------------


def test_leave_one_out_through_the_trainer_equals_normal_equations(tmp_path):
    train = data(8)
    refit = Refit(Solved, make_trainer, make_loader, "independent", tmp_path)
    scores = attributor(train, refit, Solved()).score(LeaveOneOut(), TEST)
    close(scores.values, oracles.leave_one_out(losses_on(train, keep_divisor=False), 8), 1e-7)


def test_leave_one_out_of_chosen_examples(tmp_path):
    train = data()
    asker, way = closed(tmp_path, train)
    scores = asker.score(LeaveOneOut(examples=(7, 2)), TEST)
    expected = oracles.leave_one_out(losses_on(train), 12)
    close(scores.values, expected[:, [2, 7]])
    assert scores.train_ids.tolist() == [2, 7]
    assert len(way.trained) == 3
    found = asker.estimate(LeaveOneOut(examples=(7, 2)), TEST)
    assert found.values.isnan().sum() == 10 * 4
    assert found.standard_errors is None  # the same run with other weights: nothing is random
    assert found.n_out.nonzero()[:, 0].tolist() == [2, 7]
    best = asker.score(LeaveOneOut(examples=(7, 2)), TEST, top_k=1)
    assert best.proponents(1).train_ids[:, 0].tolist() == [[2, 7][int(q[7] > q[2])] for q in expected]


def test_unknown_scores_have_no_rank(tmp_path):
    asker, _ = closed(tmp_path, data(8), fail={3})
    with pytest.warns(UserWarning, match="failed"), pytest.raises(ValueError, match=r"NaN for training examples \[3\]"):
        asker.score(LeaveOneOut(), TEST, top_k=2)


def test_leave_one_out_averages_seeds_that_are_shared(tmp_path):
    train = data()
    asker, way = closed(tmp_path, train, noise=0.05)
    found = asker.estimate(LeaveOneOut(n_seeds=6), TEST)
    rows = {}
    for membership, seed in way.trained:
        weight = way_weight(way, train, membership, seed)
        rows[membership, seed] = (TEST.tensors[0] @ weight - TEST.tensors[1]) ** 2 / 2
    whole = tuple([True] * 12)
    for i in range(12):
        out = tuple(j != i for j in range(12))
        change = torch.stack([rows[out, seed] - rows[whole, seed] for seed in range(6)])
        close(found.values[:, i], change.mean(0))
        close(found.standard_errors[:, i], change.std(0) / math.sqrt(6))
    assert len(way.trained) == 13 * 6


def way_weight(way, train, membership, seed):
    x, y = train.tensors
    mask = torch.tensor(membership).double()
    left = (x * mask[:, None]).T @ x / len(x) + DECAY * torch.eye(WIDTH).double()
    weight = torch.linalg.inv(left) @ ((x * mask[:, None]).T @ y) / len(x)
    return weight + way.noise * torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))[0]


# ---- downsampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["fixed", "bernoulli"])
def test_downsampling_equals_loops_with_errors_and_counts(tmp_path, sampling):
    train = data()
    asker, way = closed(tmp_path, train)
    method = Downsampling(n_models=9, sampling=sampling, seed=3)
    found = asker.estimate(method, TEST)
    membership = torch.tensor([m for m, _ in way.trained])
    losses = torch.stack([losses_on(train)(m.nonzero()[:, 0].tolist()) for m in membership])
    values, errors, n_in, n_out = oracles.with_and_without(membership, losses)
    close(found.values, values)
    close(found.standard_errors, errors)
    assert torch.equal(found.n_in, n_in)
    assert torch.equal(found.n_out, n_out)
    close(asker.score(method, TEST).values, values)
    own = torch.stack([losses_on(train, asked=train)(m.nonzero()[:, 0].tolist()) for m in membership])
    close(asker.self_influence(method).values, oracles.with_and_without(membership, own)[0].diagonal())
    assert len(way.trained) == len(membership) == 9


def test_never_in_or_never_out_is_nan_and_counted():
    membership = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]]).bool()
    losses = torch.tensor([[1.0], [2.0], [4.0]]).double()
    found = with_and_without(membership, losses)
    values, errors, n_in, n_out = oracles.with_and_without(membership, losses)
    close(found.values, values)
    close(found.standard_errors, errors)
    assert found.values.isnan().tolist() == [[True, False, True, False]]
    assert (found.n_in.tolist(), found.n_out.tolist()) == ([3, 2, 0, 2], [0, 1, 3, 1])
    assert torch.equal(n_in, found.n_in)
    assert torch.equal(n_out, found.n_out)


def test_over_all_subsets_of_one_size_additive_scores_are_centred():
    worth = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = subsets.every(7)
    halves = every[every.sum(1) == 3]
    found = with_and_without(halves, -(halves.double() @ worth)[:, None])
    close(found.values[0], 7 / 6 * (worth - worth.mean()))
    close(found.values.sum(1), torch.zeros(1).double())


def test_over_all_subsets_bernoulli_halves_are_banzhaf():
    train = data(6)
    every = subsets.every(6)
    values = value_on(train)
    losses = torch.stack([-values(m.nonzero()[:, 0].tolist()) for m in every])
    close(with_and_without(every, losses).values, oracles.banzhaf(values, 6))


def test_bernoulli_subsets_are_named_as_what_they_estimate(tmp_path):
    asker, _ = closed(tmp_path, data())
    scores = asker.score(Downsampling(20, sampling="bernoulli"), TEST)
    assert "Banzhaf" in scores.units
    assert "Banzhaf" not in asker.score(Downsampling(20), TEST).units


@pytest.mark.slow
def test_downsampling_converges_to_leave_one_out_where_little_is_left_out(tmp_path):
    """On a convex model, as the subsets grow: of one size, scores are n / (n - 1) of the centred ones."""
    train = data(30)
    asker, _ = closed(tmp_path, train)
    exact = oracles.leave_one_out(losses_on(train), 30)
    centred = 30 / 29 * (exact - exact.mean(1, keepdim=True))
    # All subsets of n - 1: leave-one-out itself, but for the centring.
    alone = subsets.without_each(30, torch.arange(30))
    losses = torch.stack([losses_on(train)(m.nonzero()[:, 0].tolist()) for m in alone])
    close(with_and_without(alone, losses).values, centred)
    errors = []
    for fraction in (0.5, 0.9):
        found = asker.estimate(Downsampling(n_models=1000, fraction=fraction), TEST)
        errors.append(float((found.values - centred).norm() / centred.norm()))
        if fraction == 0.9:
            within = ((found.values - centred).abs() <= 3 * found.standard_errors + 0.05 * centred.abs()).double()
            assert float(within.mean()) > 0.97
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.25


# ---- Shapley ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["initial", 2.5])
def test_shapley_exact_equals_all_orders(tmp_path, empty):
    train = data(5)
    asker, way = closed(tmp_path, train)
    value = value_on(train, None if empty == "initial" else empty)
    scores = asker.score(DataShapley(budget=31, empty=empty), TEST)
    close(scores.values, oracles.shapley_by_orders(value, 5))
    close(scores.values.sum(1), value(list(range(5))) - value([]))  # efficiency
    assert len(way.trained) == 31
    assert "Exact: all 32 subsets." in scores.notes


def test_shapley_is_symmetric_and_gives_nothing_to_a_null_player(tmp_path):
    x, y = data(8).tensors
    x, y = x.clone(), y.clone()
    x[5], y[5] = x[2], y[2]
    x[6], y[6] = 0.0, 0.0  # no gradient at any weights
    train = TensorDataset(x, y)
    asker, _ = closed(tmp_path, train)
    scores = asker.score(DataShapley(), TEST).values
    close(scores[:, 5], scores[:, 2])
    close(scores[:, 6], torch.zeros(4).double())
    sampled = asker.score(DataShapley(budget=80), TEST).values
    close(sampled[:, 6], torch.zeros(4).double())


def test_shapley_is_linear_in_the_measurement(tmp_path):
    asker, _ = closed(tmp_path, data(5))

    def shifted(module, batch):
        return 3 * plain(module, batch) + module.layer(batch[0])[:, 0]

    def prediction(module, batch):
        return module.layer(batch[0])[:, 0]

    found = [asker.score(DataShapley(), TEST, measurement=m).values for m in (plain, prediction, shifted)]
    close(found[2], 3 * found[0] + found[1])
    better = asker.score(DataShapley(), TEST, measurement=prediction, higher_is_better=True)
    close(better.values, -found[1])


def plain(module, batch):
    return (module.layer(batch[0])[:, 0] - batch[1]).pow(2) / 2


@pytest.mark.slow
def test_monte_carlo_keeps_efficiency_and_finds_the_exact_values_within_its_errors(tmp_path):
    train = data(6)
    asker, way = closed(tmp_path, train)
    exact = oracles.shapley_by_orders(value_on(train), 6)
    # All 2^6 subsets are soon in the bank: an order costs nothing new, but counts.
    sampled = DataShapley.__new__(DataShapley)
    object.__setattr__(sampled, "__dict__", {"budget": 600, **SETTINGS})
    found = sampled._monte_carlo(*opened(asker, sampled))
    assert found.n_in.tolist() == [100] * 6
    close(found.values.sum(1), exact.sum(1))
    assert float(((found.values - exact).abs() / found.standard_errors).max()) < 4
    assert float(found.standard_errors.max()) < 0.3 * float(exact.abs().max())
    assert len(way.trained) <= 63


SETTINGS = {"tolerance": 0.0, "convergence": None, "empty": "initial", "seed": 0}


def opened(asker, method):
    with asker._open(method, asker._queries(TEST)) as setting:
        return setting, setting.queries[:]


def test_truncation_is_absolute_and_bounds_what_is_lost(tmp_path):
    train = data(40)
    asker, way = closed(tmp_path, train)
    full = asker.score(DataShapley(budget=400), TEST)
    spent = len(way.trained)
    other, cut_way = closed(tmp_path / "cut", train)
    cut = other.score(DataShapley(budget=400, tolerance=0.4), TEST)
    assert "10 orders" in " ".join(full.notes)
    n_orders = int(next(n for n in cut.notes if "orders" in n).split(": ")[1].split(" ")[0])
    assert n_orders > 10
    assert len(cut_way.trained) <= 400 + n_orders
    value = value_on(train)
    whole = value(list(range(40))) - value([])
    close(full.values.sum(1), whole)
    assert float((cut.values.sum(1) - whole).abs().max()) <= 0.4
    assert spent >= 390


def test_convergence_stops_early_and_its_lack_is_noted(tmp_path):
    asker, _ = closed(tmp_path, data(10))
    early = asker.score(DataShapley(budget=1000, convergence=0.5), TEST)
    used = early.figures["models"]
    assert 100 <= used < 1000
    assert not [n for n in early.notes if "Not converged" in n]
    late = asker.score(DataShapley(budget=200, convergence=0.001), TEST)
    assert [n for n in late.notes if "Not converged" in n]
    assert late.figures["models"] == 200


# ---- KNN-Shapley -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 9])
def test_knn_shapley_equals_all_orders(k):
    draw = torch.Generator().manual_seed(0)
    distances = torch.rand(3, 5, generator=draw).round(decimals=1)  # with ties
    same = torch.rand(3, 5, generator=draw) > 0.5
    expected = oracles.shapley_by_orders(lambda ids: oracles.knn_value(distances, same, ids, k), 5)
    close(knn_shapley(distances, same, k), expected)


class Classifier(Ridge):
    def __init__(self):
        super().__init__()
        self.first, self.head = torch.nn.Linear(WIDTH, 4).double(), torch.nn.Linear(4, 3).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.head(self.first(x).tanh()), y)


def test_knn_shapley_looks_at_what_goes_into_the_last_layer():
    train, asked = data(9, classes=True), data(4, seed=1, classes=True)
    module = Classifier()
    scores = Attributor(module, train=train).score(KNNShapley(k=2), asked)

    def embed(x):
        return module.first(x).tanh().detach()

    distances = torch.cdist(embed(asked.tensors[0]), embed(train.tensors[0]))
    same = asked.tensors[1][:, None] == train.tensors[1]
    close(scores.values, knn_shapley(distances, same, 2))
    given = KNNShapley(k=2, features=lambda m, b: m.first(b[0]).tanh(), labels=lambda b: b[1])
    close(Attributor(module, train=train, batch_size=4).score(given, asked).values, scores.values)
    mean = Attributor(module, train=train).score(KNNShapley(k=2), asked, aggregate="mean")
    close(mean.values[0], scores.values.mean(0))
    assert scores.units == "share of 2 nearest neighbours with the query's label"


class Reversed(Classifier):
    """The head is registered before the layer that it follows, and a layer that nothing calls comes last."""

    def __init__(self):
        super().__init__()
        self._modules["first"] = self._modules.pop("first")
        self.unused = torch.nn.Linear(2, 2).double()


def test_knn_shapley_looks_at_the_layer_that_is_called_last_whatever_the_order_of_registration():
    train, asked = data(9, classes=True), data(4, seed=1, classes=True)
    module = Reversed()
    assert [name for name, _ in module.named_children()] == ["layer", "head", "first", "unused"]
    features = [module.first(x).tanh().detach() for x in (asked.tensors[0], train.tensors[0])]
    expected = knn_shapley(torch.cdist(*features), asked.tensors[1][:, None] == train.tensors[1], 2)
    close(Attributor(module, train=train).score(KNNShapley(k=2), asked).values, expected)


class Uncalled(Ridge):
    """Its only linear layer is called by no loss."""

    def __init__(self):
        super().__init__()
        self.unused, self.w = torch.nn.Linear(2, 2).double(), torch.nn.Parameter(torch.zeros(WIDTH).double())

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.w - batch[1].double()).square().mean()


class PerToken(Classifier):
    """The last linear layer sees each number of an example on its own."""

    def __init__(self):
        super().__init__()
        self.first, self.head = torch.nn.Linear(1, 4).double(), torch.nn.Linear(4, 3).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.head(self.first(x.reshape(-1, 1)).tanh()).unflatten(0, x.shape).mean(1)
        return torch.nn.functional.cross_entropy(z, y)


@pytest.mark.parametrize(
    ("make", "text"),
    [(Uncalled, "linear layer that the loss of Uncalled calls"), (PerToken, "one row of features for each of 9")],
)
def test_knn_shapley_without_features_says_what_to_pass(make, text):
    train = data(9, classes=True)
    with pytest.raises(ValueError, match=text + ".*Pass `features=`"):
        Attributor(make(), train=train).score(KNNShapley(k=2), train)


# ---- what all of them do ---------------------------------------------------------------------------------------------


def test_new_queries_cost_no_training(tmp_path):
    asker, way = closed(tmp_path, data(6))
    asker.score(DataShapley(), TEST)
    before = len(way.trained)
    asker.score(DataShapley(), data(9, seed=5))
    asker.score(LeaveOneOut(), data(3, seed=6))
    asker.score(Downsampling(12), data(3, seed=7), measurement=plain)
    assert len(way.trained) == before == 63  # all subsets are there: one bank serves all


@pytest.mark.parametrize("method", [LeaveOneOut(), Downsampling(12), DataShapley(budget=40)])
def test_mean_of_queries_is_the_mean_of_scores(tmp_path, method):
    asker, _ = closed(tmp_path, data(8))
    each, mean = asker.score(method, TEST), asker.score(method, TEST, aggregate="mean")
    close(mean.values[0], each.values.mean(0))


def test_failed_models_are_left_out_and_named(tmp_path):
    train = data(8)
    asker, _ = closed(tmp_path, train, fail={3})
    with pytest.warns(UserWarning, match=r"without \[3\]"):
        scores = asker.score(LeaveOneOut(), TEST)
    expected = oracles.leave_one_out(losses_on(train), 8)
    kept = [0, 1, 2, 4, 5, 6, 7]
    close(scores.values[:, kept], expected[:, kept])
    assert scores.values[:, 3].isnan().all()
    assert "told to" in " ".join(scores.notes)
    with pytest.warns(UserWarning, match="failed"), pytest.raises(RuntimeError, match="for each of the subsets"):
        asker.score(DataShapley(), TEST)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: LeaveOneOut(n_seeds=0), ValueError, "`n_seeds` to be a positive integer, got 0"),
        (lambda a: LeaveOneOut(n_seeds=True), ValueError, "`n_seeds` to be a positive integer, got True"),
        (lambda a: LeaveOneOut(n_seeds=1.5), ValueError, "`n_seeds` to be a positive integer, got 1.5"),
        (lambda a: a.score(LeaveOneOut(examples=(12,)), TEST), ValueError, r"ids below 12, got \[12\]"),
        (lambda a: Downsampling(n_models=1), ValueError, "`n_models` to be an integer of at least 2, got 1"),
        (lambda a: Downsampling(n_models=5.0), ValueError, "`n_models` to be an integer of at least 2, got 5.0"),
        (lambda a: Downsampling(fraction=1.0), ValueError, "`fraction` to be a number between 0 and 1, got 1.0"),
        (lambda a: Downsampling(fraction=float("nan")), ValueError, "between 0 and 1, got nan"),
        (lambda a: Downsampling(sampling="poisson"), ValueError, "got 'poisson'"),
        (lambda a: a.self_influence(Downsampling(2)), ValueError, "Train more"),
        (lambda a: DataShapley(budget=0), ValueError, "`budget` to be a positive integer, got 0"),
        (lambda a: DataShapley(budget=True), ValueError, "`budget` to be a positive integer, got True"),
        (lambda a: DataShapley(budget=99.5), ValueError, "`budget` to be a positive integer, got 99.5"),
        (
            lambda a: DataShapley(tolerance=-0.1),
            ValueError,
            "`tolerance` to be a finite number of at least 0, got -0.1",
        ),
        (
            lambda a: DataShapley(tolerance=True),
            ValueError,
            "`tolerance` to be a finite number of at least 0, got True",
        ),
        (lambda a: DataShapley(tolerance=float("nan")), ValueError, "finite number of at least 0, got nan"),
        (lambda a: DataShapley(empty="final"), ValueError, "a number or 'initial', got 'final'"),
        (lambda a: a.score(DataShapley(budget=11), TEST), ValueError, "one order of the 12 training examples"),
        (lambda a: KNNShapley(k=0), ValueError, "`k` to be a positive integer, got 0"),
        (lambda a: KNNShapley(k=True), ValueError, "`k` to be a positive integer, got True"),
        (lambda a: KNNShapley(k=2.5), ValueError, "`k` to be a positive integer, got 2.5"),
        (lambda a: a.score(KNNShapley(), TEST, measurement=plain), ValueError, "reads no loss"),
        (lambda a: Attributor(Bare(), train=TEST).score(KNNShapley(), TEST), ValueError, "pass `features=`"),
        (
            lambda a: Attributor(Ridge(), train=Unlabelled()).score(KNNShapley(features=first), TEST),
            ValueError,
            "Pass `labels=`",
        ),
        (lambda a: a.score(KNNShapley(features=first), TEST), ValueError, "Expected labels of classes .* numbers such"),
        (lambda a: a.estimate(GradientDot(), TEST), TypeError, "trains models, such as"),
        (lambda a: Attributor(Ridge(), train=TEST).score(LeaveOneOut(), TEST), MissingEvidence, "refit=Refit"),
        (lambda a: a.self_influence(LeaveOneOut()), NotImplementedError, "has no self-influence"),
    ],
)
def test_errors(tmp_path, call, error, message):
    asker, _ = closed(tmp_path, data())
    with pytest.raises(error, match=message):
        call(asker)


def first(module, batch):
    return batch["x"] if isinstance(batch, dict) else batch[0]


class Bare(Ridge):
    def __init__(self):
        super().__init__()
        self.layer = None
        self.weight = torch.nn.Parameter(torch.zeros(WIDTH).double())


class Unlabelled(Subset):
    def __init__(self):
        super().__init__(TEST, range(4))

    def __getitem__(self, i):
        return {"x": TEST[i][0]}

    def __getitems__(self, ids):
        return [self[i] for i in ids]
