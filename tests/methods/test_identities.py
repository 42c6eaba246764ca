"""What TracInCP and GradientDot must satisfy, whatever the model; and what the paper's own units say."""

import oracles
import pytest
import torch
from case import Items, Step, both, drawn, mlp
from fits import fit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributor, GradientDot, Influence, TracInCP, Trajectory

torch.set_num_threads(1)
DATA = both(5)
METHODS = [GradientDot(), GradientDot("cosine"), GradientDot("layerwise")]
ids = {"ids": repr}


def model(seed=0, net=mlp):
    torch.manual_seed(seed)
    return Step(net()).double()


def score(method, train, queries, module=None, **options):
    return Attributor(module or model(), train, **options).score(method, queries).values


class OneStep(Step):
    """Plain gradient descent at a learning rate of one's choice."""

    def __init__(self, rate, net=None):
        super().__init__(net or mlp())
        self.rate = rate

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


def traced(folder, rate, max_epochs=1, batch_size=3, data=None, net=None, **options):
    """A fit in the dataset's order and its trajectory."""
    torch.manual_seed(0)
    module, data = OneStep(rate, net).double(), data or DATA["train"]()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    capture = Influence(dirpath=folder, **options)
    fit(module, DataLoader(data, batch_size), capture, max_epochs=max_epochs)
    return module, data, Trajectory.load(folder), before


# ---- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, **ids)
def test_gradient_dot_is_symmetric_in_query_and_training_example(method):
    train, queries = DATA["train"](), DATA["queries"]()
    there, back = score(method, train, queries), score(method, queries, train)
    torch.testing.assert_close(there, back.T)


@pytest.mark.parametrize("method", METHODS, **ids)
def test_permuting_the_training_set_permutes_the_columns(method):
    train, queries = DATA["train"](), DATA["queries"]()
    order = torch.randperm(len(train), generator=drawn(3)).tolist()
    permuted = score(method, Items([train[i] for i in order]), queries)
    torch.testing.assert_close(permuted, score(method, train, queries)[:, order])


@pytest.mark.parametrize("method", METHODS, **ids)
def test_a_duplicate_of_the_query_is_a_proponent(method):
    train, queries = DATA["train"](), DATA["queries"]()
    values = score(method, Items([*train.items, *queries.items]), queries)
    assert bool((values[:, len(train) :].diagonal() > 0).all())


@pytest.mark.parametrize("method", [GradientDot("cosine"), GradientDot("layerwise")], **ids)
def test_gas_does_not_see_the_scale_of_an_examples_loss(method):
    train, queries = DATA["train"](), DATA["queries"]()

    def scaled(module, batch):
        return (1 + batch[0][:, 0].abs() * 7) * F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    torch.testing.assert_close(score(method, train, queries, loss=scaled), score(method, train, queries))


@pytest.mark.parametrize("layerwise", [False, True])
def test_normalised_scores_are_those_of_gradients_of_length_one(layerwise):
    train, queries, module = DATA["train"](), DATA["queries"](), model()
    names = [name for name, _ in module.named_parameters()]
    ones = [list(DataLoader(data, 1)) for data in (queries, train)]
    left, right = (oracles.unit(oracles.rows(module, each, names), layerwise) for each in ones)
    method = GradientDot("layerwise" if layerwise else "cosine")
    oracles.assert_scores(score(method, train, queries, module), oracles.inner(left, right), 1e-10)


def test_cosines_with_oneself_are_one_and_others_at_most_one():
    train = DATA["train"]()
    values = score(GradientDot("cosine"), train, train)
    torch.testing.assert_close(values.diagonal(), torch.ones(len(train), dtype=torch.float64))
    assert float(values.abs().max()) <= 1 + 1e-12


def test_self_influence_is_the_diagonal_and_never_negative():
    train, module = DATA["train"](), model()
    own = Attributor(module, train).self_influence(GradientDot()).values
    torch.testing.assert_close(own, score(GradientDot(), train, train, module).diagonal())
    assert float(own.min()) >= 0


def test_the_mean_of_all_queries_scores_as_the_mean_of_their_scores():
    train, queries = DATA["train"](), DATA["queries"]()
    mean = Attributor(model(), train).score(GradientDot(), queries, aggregate="mean").values
    torch.testing.assert_close(mean[0], score(GradientDot(), train, queries).mean(0))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.sampled_from(["mlp", "conv", "table"]))
def test_scores_do_not_depend_on_the_size_of_blocks(size, kind):
    nets = {
        "mlp": (mlp, both(5)),
        "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)), both(1, 4, 5)),
        "table": (lambda: nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(12, 3)), both(6, high=9)),
    }
    net, data = nets[kind]
    module, train, queries = model(net=net), data["train"](), data["queries"]()
    names = [name for name, _ in module.named_parameters()]
    ones = [list(DataLoader(each, 1)) for each in (queries, train)]
    expected = oracles.inner(*(oracles.rows(module, each, names) for each in ones))
    oracles.assert_scores(score(GradientDot(), train, queries, module, batch_size=size), expected, 1e-10)


# ---- TracInCP's scale -----------------------------------------------------------------------------------------------


def test_one_step_lowers_a_querys_loss_by_its_scores_up_to_second_order(tmp_path):
    """The error falls fourfold when the learning rate halves: sign, learning rate and 1/B are all as stated."""
    queries, errors = DATA["queries"](), []
    for rate in (0.02, 0.01):
        module, data, trajectory, before = traced(tmp_path / str(rate), rate, batch_size=8)
        after = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        x, y = (torch.stack(each) for each in zip(*queries.items, strict=True))
        losses = []
        for state in (before, after):
            module.load_state_dict(state)
            losses.append(F.cross_entropy(module(x), y, reduction="none").detach())
        module.load_state_dict(after)
        predicted = Attributor(module, data, trajectory).score(TracInCP(checkpoints=(0,)), queries).values
        exposure = trajectory.exposure(1, "mean", len(data))
        torch.testing.assert_close(exposure, torch.full((1, 8), rate / 8, dtype=torch.float64))
        assert float(predicted.abs().max()) == 0.0  # the initial weights stand for no step
        module.load_state_dict(before)
        dots = Attributor(module, data).score(GradientDot(), queries).values
        errors.append((losses[0] - losses[1] - (dots * exposure).sum(1)).abs())
    torch.testing.assert_close(errors[0] / errors[1], torch.full((4,), 4.0, dtype=torch.float64), rtol=0.05, atol=0)


def test_scores_are_linear_in_the_learning_rate(tmp_path):
    """A rate of nearly zero leaves the weights where they are: what remains is the coefficient."""
    scores = []
    for rate in (1e-9, 3e-9):
        module, data, trajectory, _ = traced(tmp_path / str(rate), rate)
        scores.append(Attributor(module, data, trajectory).score(TracInCP(), DATA["queries"]()).values)
    torch.testing.assert_close(scores[1], 3 * scores[0], rtol=1e-6, atol=0)


def test_each_checkpoint_answers_for_the_steps_before_it(tmp_path):
    """Checkpoints after every second step of three examples: each counts just those six of the eight, in turn."""
    module, data, trajectory, _ = traced(tmp_path, 0.05, max_epochs=2, every_n_train_steps=2)
    drawn_ids = trajectory.steps["ids"].to_pylist()
    queries = DATA["queries"]()
    steps = [checkpoint.step for checkpoint in trajectory.checkpoints]
    windows = []
    for first, last, checkpoint in zip(steps[:-1], steps[1:], trajectory.checkpoints[1:], strict=True):
        coefficient = torch.zeros(1, len(data), dtype=torch.float64)
        for row in drawn_ids[first:last]:
            for i in row[0]:
                coefficient[0, i] += 0.05 / len(row[0])
        windows.append((checkpoint.load().parameters, coefficient))
    names = [name for name, _ in module.named_parameters()]
    ones = [list(DataLoader(each, 1)) for each in (data, queries)]
    expected = oracles.tracin(module, *ones, names, windows)
    actual = Attributor(module, data, trajectory).score(TracInCP(), queries).values
    oracles.assert_scores(actual, expected, 1e-10)
    assert len(windows) == 3


def test_paper_units_take_the_learning_rate_alone(tmp_path):
    module, data, trajectory, _ = traced(tmp_path, 0.05, max_epochs=2)
    names = [name for name, _ in module.named_parameters()]
    ones = [list(DataLoader(each, 1)) for each in (data, DATA["queries"]())]
    windows = [(c.load().parameters, torch.full((1, len(data)), 0.05)) for c in trajectory.checkpoints[1:]]
    actual = Attributor(module, data, trajectory).score(TracInCP(units="paper"), DATA["queries"]()).values
    oracles.assert_scores(actual, oracles.tracin(module, *ones, names, windows), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MLP", "CNN"])
def test_paper_units_equal_captum(kind, tmp_path):
    captum = pytest.importorskip("captum.influence")
    make = {
        "MLP": lambda: mlp(8, 16),
        "CNN": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)),
    }[kind]
    shape = {"MLP": (8,), "CNN": (1, 5, 4)}[kind]
    g = drawn(0)
    tensors = TensorDataset(torch.randn(12, *shape, generator=g).double(), torch.randint(3, (12,), generator=g))
    queries = TensorDataset(torch.randn(4, *shape, generator=g).double(), torch.randint(3, (4,), generator=g))
    module, data, trajectory, _ = traced(tmp_path, 0.05, 2, 4, tensors, make())
    ours = Attributor(module, data, trajectory).score(TracInCP(units="paper"), queries).values
    states = [c.load().parameters for c in trajectory.checkpoints[1:]]

    def load(network, state):
        network.load_state_dict(state)
        return 0.05

    tracin = captum.TracInCP(
        module.eval(),
        tensors,
        states,
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=4,
    )
    theirs = tracin.influence((queries.tensors[0], queries.tensors[1]))
    oracles.assert_scores(ours, theirs.detach(), 1e-6)
