"""SOURCE against matrix exponentials; its limits; what it refuses."""

import oracles
import oracles_curvature as dense
import pytest
import torch
from case import Step, both, mlp
from fits import fit
from torch import nn
from torch.utils.data import DataLoader
from traced import Still, still

from lightning_influence import (
    EKFAC,
    SOURCE,
    Attributor,
    ConjugateGradient,
    ExactGGN,
    ExactHessian,
    Influence,
    InfluenceFunction,
    MissingEvidence,
    Trajectory,
)
from lightning_influence.conformance import check_method
from lightning_influence.gradients.queries import DenseQueries
from lightning_influence.gradients.running_sum import RunningSum
from lightning_influence.methods import segment_product
from lightning_influence.wording import counted

torch.set_num_threads(1)
DECAY, RATE, MOMENTUM, EPOCHS, BATCH = 0.05, 0.2, 0.5, 5, 3


class Moving(Step):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)


def squared(z, y):
    return (z[:, 0] - y).square().mean()


PROBLEMS = {  # network, data, loss, what the loss is bent by
    "classes": (mlp, both(5), nn.functional.cross_entropy, dense.softmax_bend),
    "numbers": (lambda: nn.Linear(5, 1), both(5, target="number"), squared, dense.square_bend),
}


def fitted(name, folder):
    net, data, loss, _ = PROBLEMS[name]
    torch.manual_seed(0)
    module, train = Moving(net(), loss).double(), data["train"]()
    fit(module, DataLoader(train, BATCH, shuffle=True), Influence(dirpath=folder), max_epochs=EPOCHS)
    return module, train, data["queries"](), Trajectory.load(folder)


def expected(name, module, train, queries, trajectory, runs):
    """By dense algebra; ``runs`` are the positions of the checkpoints of each segment."""
    bend, names = PROBLEMS[name][3], [n for n, _ in module.named_parameters()]
    ones, asked = ([[part[None] for part in item] for item in d.items] for d in (train, queries))
    states = [c.load().parameters for c in trajectory.checkpoints]
    steps = -(-len(train) // BATCH)
    segments = []
    for run in runs:
        middle = states[run[len(run) // 2]]
        each = dense.each_ggn(module, ones, names, lambda m, one: m.net(one[0]), bend, middle)
        curvature = each.mean(0) + DECAY * torch.eye(each.shape[1], dtype=torch.float64)
        gradients = torch.stack([dense.gradients(module, ones, names, state=states[k]) for k in run]).mean(0)
        segments.append((curvature, len(run) * steps * RATE / (1 - MOMENTUM), gradients))
    return dense.source(dense.gradients(module, asked, names, state=states[-1]), segments)


@pytest.mark.parametrize(
    ("name", "segments", "curvature", "runs"),
    [
        ("classes", 3, ExactGGN(), [(1, 2), (3,), (4, 5)]),
        ("classes", 1, ExactGGN(), [(1, 2, 3, 4, 5)]),
        ("classes", 9, ExactGGN(), [(1,), (2,), (3,), (4,), (5,)]),
        # the Fisher of a linear regression has one layer and one output: its factors are exact
        ("numbers", 2, EKFAC(labels="exact", tolerance=0), [(1, 2), (3, 4, 5)]),
        ("numbers", 2, ExactHessian(), [(1, 2), (3, 4, 5)]),
    ],
)
def test_scores_are_those_of_matrix_exponentials(tmp_path, name, segments, curvature, runs):
    module, train, queries, trajectory = fitted(name, tmp_path)
    scores = Attributor(module, train, trajectory).score(SOURCE(segments, curvature), queries)
    oracles.assert_scores(scores.values, expected(name, module, train, queries, trajectory, runs), 1e-9)
    assert scores.units == "loss"
    assert any(f"{counted(len(runs), 'segment')} with sums of learning rates" in note for note in scores.notes)
    assert any("no more checkpoints" in note for note in scores.notes) == (segments == 9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "segments", "curvature", "runs"),
    [
        ("classes", 3, ExactGGN(), [(1, 2), (3,), (4, 5)]),
        ("numbers", 2, EKFAC(labels="exact"), [(1, 2), (3, 4, 5)]),
    ],
)
def test_self_influence_is_the_diagonal_of_matrix_exponentials(tmp_path, monkeypatch, name, segments, curvature, runs):
    module, train, _, trajectory = fitted(name, tmp_path)
    right = expected(name, module, train, train, trajectory, runs).diagonal()
    found = Attributor(module, train, trajectory).self_influence(SOURCE(segments, curvature))
    oracles.assert_scores(found.values, right, 1e-9)
    assert found.units == "loss"
    monkeypatch.setattr("lightning_influence.curvature.curvature._BYTES", 2000)  # a few at once
    small = Attributor(module, train, trajectory, batch_size=5).self_influence(SOURCE(segments, curvature))
    oracles.assert_scores(small.values, right, 1e-9)


@pytest.mark.parametrize(
    ("settings", "products"),
    [
        ({}, 2 * 3),  # one per block of training examples and segment
        ({"GRADIENT_BYTES": 1300, "_LOADING": 0}, 2 * 3),  # in two tiles
        ({"GRADIENT_BYTES": 1300}, 2 * 5),  # loading checkpoints twice would take longer: one per checkpoint
        ({"GRADIENT_BYTES": 1}, 2 * 5),  # no sums fit
    ],
)
def test_gradients_are_summed_over_a_segment_where_that_is_cheaper(tmp_path, monkeypatch, settings, products):
    for name, value in settings.items():
        monkeypatch.setattr(segment_product, name, value)
    count, made = DenseQueries.dot, []
    monkeypatch.setattr(DenseQueries, "dot", lambda *sides: made.append(0) or count(*sides))
    module, train, queries, trajectory = fitted("classes", tmp_path)
    attributor, method = Attributor(module, train, trajectory, batch_size=4), SOURCE(3, ExactGGN())
    scores = attributor.score(method, queries)
    wanted = expected("classes", module, train, queries, trajectory, [(1, 2), (3,), (4, 5)])
    oracles.assert_scores(scores.values, wanted, 1e-9)
    assert len(made) == products
    best = attributor.score(method, queries, top_k=2)
    torch.testing.assert_close(best.proponents(2).scores, scores.proponents(2).scores)
    torch.testing.assert_close(attributor.group(method, [0, 3, 6], queries), scores.values[:, [0, 3, 6]].sum(1))


@pytest.mark.slow
def test_where_memory_does_not_suffice_nothing_is_summed(tmp_path, monkeypatch):
    def add(total, gradients):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(RunningSum, "add", add)
    module, train, queries, trajectory = fitted("classes", tmp_path)
    scores = Attributor(module, train, trajectory, batch_size=4).score(SOURCE(3, ExactGGN()), queries)
    wanted = expected("classes", module, train, queries, trajectory, [(1, 2), (3,), (4, 5)])
    oracles.assert_scores(scores.values, wanted, 1e-9)
    assert any("blocks of 4 examples: they were scored in blocks of 2" in note for note in scores.notes)


def test_an_interrupt_leaves_the_tiles_that_were_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_product, "GRADIENT_BYTES", 1300)
    monkeypatch.setattr(segment_product, "_LOADING", 0)
    module, train, queries, trajectory = fitted("classes", tmp_path)
    attributor, method = Attributor(module, train, trajectory, batch_size=4), SOURCE(3, ExactGGN())
    whole = attributor.score(method, queries).values
    real, calls = DenseQueries.dot, []

    def dot(*sides):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*sides)

    monkeypatch.setattr(DenseQueries, "dot", dot)
    with pytest.raises(KeyboardInterrupt) as caught:
        attributor.score(method, queries)
    torch.testing.assert_close(caught.value.scores.values, whole[:, :4])


def test_queries_in_blocks_and_their_mean_are_the_same(tmp_path):
    module, train, queries, trajectory = fitted("classes", tmp_path)
    method = SOURCE(2, ExactGGN())
    whole = Attributor(module, train, trajectory).score(method, queries).values
    small = Attributor(module, train, trajectory, batch_size=2)
    torch.testing.assert_close(small.score(method, queries).values, whole)
    torch.testing.assert_close(small.score(method, queries, aggregate="mean").values, whole.mean(0, keepdim=True))


def test_after_a_long_fit_it_is_an_influence_function_without_damping(tmp_path):
    data = both(5, target="number")
    torch.manual_seed(0)
    module = Still(nn.Linear(5, 1), squared, DECAY, RATE).double()
    trajectory = still(module, tmp_path, {"dampening": 0, "momentum": 0.0, "weight_decay": DECAY}, rate=RATE, step=5000)
    attributor = Attributor(module, data["train"](), trajectory)
    found = attributor.score(SOURCE(1, ExactGGN()), data["queries"]()).values
    names = [n for n, _ in module.named_parameters()]
    ones, asked = ([[part[None] for part in item] for item in data[side]().items] for side in ("train", "queries"))
    curvature = dense.each_ggn(module, ones, names, lambda m, one: m.net(one[0]), dense.square_bend).mean(0)
    sides = dense.gradients(module, asked, names), dense.gradients(module, ones, names)
    oracles.assert_scores(found, dense.influence(sides[0], curvature, DECAY, sides[1]), 1e-9)
    torch.testing.assert_close(found, attributor.score(InfluenceFunction(ExactGGN(0)), data["queries"]()).values)


@pytest.mark.slow
def test_it_keeps_every_promise():
    check_method(SOURCE(2, ExactGGN()))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"segments": 0}, ValueError, "Expected `segments` to be a positive integer, got 0"),
        ({"segments": True}, ValueError, "Expected `segments` to be a positive integer, got True"),
        ({"segments": 1.5}, ValueError, "Expected `segments` to be a positive integer, got 1.5"),
        ({"curvature": ConjugateGradient()}, TypeError, r"`EKFAC\(\)` or `ExactGGN\(\)`, got ConjugateGradient"),
        ({"curvature": 3}, TypeError, "one with eigenvalues, .* got 3"),
    ],
)
def test_wrong_settings_are_refused(settings, error, text):
    with pytest.raises(error, match=text):
        SOURCE(**settings)


def test_a_curvature_without_eigenvalues_says_so():
    with pytest.raises(NotImplementedError, match="curvature with eigenvalues, got `ConjugateGradient`"):
        ConjugateGradient().descend(None, {}, None, None)


@pytest.mark.parametrize(
    ("groups", "options", "error", "text"),
    [
        ([{"dampening": 0}], {"step": 0}, MissingEvidence, "`SOURCE` needs checkpoints after the first step"),
    ],
)
def test_fits_that_it_cannot_follow_are_refused(tmp_path, groups, options, error, text):
    data = both(5, target="number")
    module = Step(nn.Linear(5, 1), squared).double()
    attributor = Attributor(module, data["train"](), still(module, tmp_path, *groups, **options))
    with pytest.raises(error, match=text):
        attributor.score(SOURCE(1, ExactGGN()), data["queries"]())
