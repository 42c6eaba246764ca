"""Representer points: what they add up to, whatever the loss; features taken once; what cannot work is named."""

import contextlib
import gc
import tempfile
import warnings
from pathlib import Path

import oracles
import oracles_heads
import pytest
import torch
from case import Items, Step, both, mlp
from fits import fit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Attributor, Influence, RepresenterPoints, Trajectory
from lightning_influence.conformance import check_method
from lightning_influence.methods import representer_points

torch.set_num_threads(1)


def softened(z, y):
    return F.cross_entropy(z, y, label_smoothing=0.2, reduction="none")


def squared(z, y):
    return (z - y.view(-1, 1)).square().mean(1)


def binary(z, y):
    return F.binary_cross_entropy_with_logits(z[:, 0], y, reduction="none")


# kind -> per-sample loss of pre-activations, classes, what the targets are, what the step does
KINDS = {
    "softmax": (lambda z, y: F.cross_entropy(z, y, reduction="none"), 3, "class", F.cross_entropy),
    "soft labels": (softened, 3, "class", lambda z, y: softened(z, y).mean()),
    "binary": (binary, 1, "binary", lambda z, y: F.binary_cross_entropy_with_logits(z.squeeze(1), y)),
    "regression": (squared, 2, "number", lambda z, y: F.mse_loss(z, y.view(-1, 1).expand_as(z))),
    "summed": (lambda z, y: 0.3 * squared(z, y), 1, "number", lambda z, y: 0.3 * (z - y.view(-1, 1)).square().sum()),
}


class Problem:
    """A small network with a linear head, and the same seen by hand."""

    def __init__(self, kind, bias=True, n=12):
        self.loss, classes, target, step = KINDS[kind]
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.head = nn.Linear(4, classes, bias)
        self.module = Step(nn.Sequential(self.body, self.head), step).double()
        data = both(5, target=target, n=n)
        self.train, self.queries = data["train"](), data["queries"]()
        sides = [next(iter(DataLoader(side, len(side)))) for side in (self.train, self.queries)]
        with torch.no_grad():
            self.features, self.asked = (oracles_heads.with_one(self.body(x), bias) for x, _ in sides)
            parts = [self.head.weight] + ([self.head.bias[:, None]] if bias else [])
            self.weight = torch.cat(parts, 1)
        self.targets, self.asked_targets = (y for _, y in sides)

    def minimum(self, weight_decay=0.006):
        return oracles_heads.minimum(self.loss, self.weight, self.features, self.targets, weight_decay)

    def score(self, method, **options):
        return Attributor(self.module, self.train, **options).score(method, self.queries)


# ---- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bias"), [*((kind, True) for kind in KINDS), ("softmax", False), ("summed", False)])
def test_the_sum_over_training_examples_is_the_pre_activation_at_the_minimum(kind, bias):
    problem = Problem(kind, bias)
    z = problem.asked @ problem.minimum().T
    for c in range(z.shape[1]):
        found = problem.score(RepresenterPoints(of=c)).values.sum(1)
        torch.testing.assert_close(found, z[:, c], rtol=1e-6, atol=1e-6 * float(z.abs().max()))


@pytest.mark.parametrize("kind", ["softmax", "binary", "regression"])
def test_each_term_is_that_of_the_paper_in_its_own_lambda(kind):
    problem, yeh = Problem(kind), 0.01
    weight = problem.minimum(2 * yeh)
    alpha = oracles_heads.alphas(problem.loss, weight, problem.features, problem.targets, yeh)
    for c in range(alpha.shape[1]):
        expected = oracles_heads.terms(alpha, problem.features, problem.asked, c)
        oracles.assert_scores(problem.score(RepresenterPoints(of=c, weight_decay=2 * yeh)).values, expected, 1e-8)


@pytest.mark.parametrize("kind", ["softmax", "binary", "regression"])
def test_influence_on_the_loss_is_the_double_loop(kind):
    problem = Problem(kind)
    weight = problem.minimum()
    alpha = oracles_heads.alphas(problem.loss, weight, problem.features, problem.targets, 0.003)
    gradients = oracles_heads.gradients(problem.loss, weight, problem.asked, problem.asked_targets)
    expected = oracles_heads.on_loss(alpha, problem.features, problem.asked, gradients)
    scores = problem.score(RepresenterPoints())
    oracles.assert_scores(scores.values, expected, 1e-8)
    assert scores.units == "loss"
    assert scores.figures["reconstruction_error"] < 1e-9
    assert "solved in" in scores.notes[0]


@pytest.mark.parametrize("kind", ["softmax", "binary", "regression"])
def test_away_from_the_minimum_the_gradient_is_what_the_sum_misses(kind):
    problem, weight_decay = Problem(kind), 0.05
    weight = problem.weight.clone().requires_grad_()
    value = oracles_heads.objective(problem.loss, weight, problem.features, problem.targets, weight_decay)
    (gradient,) = torch.autograd.grad(value, weight)
    for c in range(len(weight)):
        scores = problem.score(RepresenterPoints(of=c, weight_decay=weight_decay, refit=False))
        rest = problem.asked @ gradient[c] / weight_decay
        torch.testing.assert_close(scores.values.sum(1) + rest, problem.asked @ weight[c].detach())
    longest = float(problem.features.norm(dim=1).max())
    assert (
        f"gives its outputs for each of them to within {gradient.norm() / weight_decay * longest:.1e}"
        in (scores.notes[0])
    )
    assert f"gradient norm {gradient.norm():.1e} with weight decay 0.05" in scores.notes[0]


def test_the_models_own_outputs_as_targets():
    problem, weight_decay = Problem("softmax"), 0.02
    own = (problem.features @ problem.weight.T).softmax(1)
    loss = lambda z, y: F.cross_entropy(z, y, reduction="none")  # noqa: E731
    weight = oracles_heads.minimum(loss, problem.weight, problem.features, own, weight_decay)
    alpha = oracles_heads.alphas(loss, weight, problem.features, own, weight_decay / 2)
    asked = oracles_heads.gradients(problem.loss, weight, problem.asked, problem.asked_targets)
    method = RepresenterPoints(target="model", weight_decay=weight_decay)
    expected = oracles_heads.on_loss(alpha, problem.features, problem.asked, asked)
    oracles.assert_scores(problem.score(method).values, expected, 1e-8)
    assert not torch.allclose(expected, problem.score(RepresenterPoints(weight_decay=weight_decay)).values, rtol=0.1)


def test_label_takes_each_querys_own_class():
    problem = Problem("softmax")
    by_class = torch.stack([problem.score(RepresenterPoints(of=c)).values for c in range(3)])
    label = problem.score(RepresenterPoints(of="label"))
    assert len(set(problem.asked_targets.tolist())) > 1
    torch.testing.assert_close(label.values, by_class[problem.asked_targets, torch.arange(len(problem.queries))])
    assert label.units == "pre-activation"


def test_a_measurement_is_taken_at_the_minimum():
    problem = Problem("softmax")

    def margin(module, batch):
        z = module(batch[0])
        return z[:, 0] - z[:, 1:].logsumexp(1)

    attributor = Attributor(problem.module, problem.train)
    options = {"measurement": margin, "higher_is_better": True}
    found = attributor.score(RepresenterPoints(), problem.queries, **options).values
    weight = problem.minimum()
    z = (problem.asked @ weight.T).requires_grad_()
    (gradient,) = torch.autograd.grad((z[:, 0] - z[:, 1:].logsumexp(1)).sum(), z)
    alpha = oracles_heads.alphas(problem.loss, weight, problem.features, problem.targets, 0.003)
    oracles.assert_scores(found, -oracles_heads.on_loss(alpha, problem.features, problem.asked, gradient), 1e-8)


@pytest.mark.parametrize("of", ["loss", "label", 1])
def test_self_influence_is_the_diagonal_and_the_mean_of_queries_their_mean(of):
    problem = Problem("softmax")
    attributor = Attributor(problem.module, problem.train)
    pairs = attributor.score(RepresenterPoints(of=of), problem.train).values
    torch.testing.assert_close(attributor.self_influence(RepresenterPoints(of=of)).values, pairs.diagonal())
    mean = attributor.score(RepresenterPoints(of=of), problem.train, aggregate="mean").values
    torch.testing.assert_close(mean[0], pairs.mean(0))


@pytest.mark.slow
@pytest.mark.parametrize("method", [RepresenterPoints("label"), RepresenterPoints(refit=False)])
def test_every_promise_is_kept_by_its_settings(method):
    check_method(method)


def test_the_head_may_be_named():
    torch.manual_seed(0)

    class Two(Step):
        def training_step(self, batch, batch_idx):
            hidden = self.net[0](batch[0]).tanh()
            return self.loss(self.net[1](hidden), batch[1]) + 0 * self.other(hidden).sum()

    problem = Problem("softmax")
    module = Two(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))).double()
    module.other = nn.Linear(4, 2).double()
    attributor = Attributor(module, problem.train)
    with pytest.raises(ValueError, match=r"got another loss.*`head=`"):
        attributor.score(RepresenterPoints(), problem.queries)
    named = attributor.score(RepresenterPoints(head="net.1"), problem.queries)
    assert "`net.1`" in named.notes[0]


# ---- features: once, on disk, forward only --------------------------------------------------------------------------


WENT_FORWARD = []


class Counting(Step):
    """Writes down the sizes of the batches that went forward."""

    def training_step(self, batch, batch_idx):
        WENT_FORWARD.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


class ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("a gradient of the body was taken")


class NoWayBack(nn.Module):
    def forward(self, x):
        return ForwardOnly.apply(x)


def test_no_gradient_of_the_body_is_taken():
    problem = Problem("softmax")
    before = problem.score(RepresenterPoints()).values
    problem.body[1] = NoWayBack()
    torch.testing.assert_close(problem.score(RepresenterPoints()).values, before)


@pytest.fixture
def captured(tmp_path):
    torch.manual_seed(0)
    module, data = Counting(mlp()).double(), both(5, n=60)
    train, queries = data["train"](), data["queries"]()
    fit(module, DataLoader(train, 10, shuffle=True), Influence(dirpath=tmp_path), max_epochs=2)
    return module, train, queries, Trajectory.load(tmp_path)


def test_features_are_taken_once_and_kept_with_the_trajectory(captured):
    module, train, queries, trajectory = captured
    attributor = Attributor(module, train, trajectory)
    first = attributor.score(RepresenterPoints(), queries).values
    again = Attributor(module, train, trajectory)
    again.score(RepresenterPoints(of=1), queries)  # with another attributor's probes
    WENT_FORWARD.clear()
    second = again.score(RepresenterPoints(), queries)
    # the comparison with the fit, the head, its loss (twice) and the stored rows: a few examples; then the queries
    assert WENT_FORWARD == [4, 1, 32, 32, 8, 4]
    torch.testing.assert_close(second.values, first)
    assert "solved in" in second.notes[0]
    assert len(list((trajectory.path / "features").glob("*.head.arrow"))) == 1


@pytest.mark.parametrize("spoiled", ["cut short", "other data", "other loss", "other weights", "too few"])
def test_a_file_that_does_not_fit_is_written_anew(captured, spoiled, tmp_path):
    module, train, queries, trajectory = captured
    Attributor(module, train, trajectory).score(RepresenterPoints(), queries)
    (path,) = [p for p in (trajectory.path / "features").glob("*.arrow") if ".head" not in p.name]
    options = {}
    if spoiled == "cut short":
        path.write_bytes(path.read_bytes()[:-200])
    elif spoiled == "other data":
        train, options = Items([(x + 1, y) for x, y in train.items]), {"check_data": False}
    elif spoiled == "other loss":
        options["loss"] = lambda module, batch: 3 * F.cross_entropy(module(batch[0]), batch[1], reduction="none")
    elif spoiled == "other weights":
        write_other_weights(trajectory, module)
    else:
        from lightning_influence.files.arrow import read_file, write_file

        kind, columns, metadata = read_file(path, ["features"])
        write_file(path, kind, {name: c[:-1].clone() for name, c in columns.items()}, metadata, overwrite=True)
    found = Attributor(module, train, trajectory, **options).score(RepresenterPoints(), queries).values
    for file in (trajectory.path / "features").iterdir():
        file.unlink()
    expected = Attributor(module, train, trajectory, **options).score(RepresenterPoints(), queries).values
    torch.testing.assert_close(found, expected)


def write_other_weights(trajectory, module):
    """The stored features are as those of another network."""
    from lightning_influence.files.arrow import read_file, write_file

    (path,) = [p for p in (trajectory.path / "features").glob("*.arrow") if ".head" not in p.name]
    kind, columns, metadata = read_file(path, ["features"])
    columns = {name: c.clone() * (1.3 if name == "features" else 1.0) for name, c in columns.items()}
    write_file(path, kind, columns, metadata, overwrite=True)


def test_a_stored_head_that_is_no_minimum_is_not_taken(captured):
    from lightning_influence.files.arrow import write_file

    module, train, queries, trajectory = captured
    expected = Attributor(module, train, trajectory).score(RepresenterPoints(), queries).values
    (path,) = (trajectory.path / "features").glob("*.head.arrow")
    for weight in (torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)):
        write_file(path, "head", {"weight": weight}, {"iterations": 1}, overwrite=True)
        torch.testing.assert_close(
            Attributor(module, train, trajectory).score(RepresenterPoints(), queries).values, expected
        )


def test_a_solve_that_stopped_early_goes_on_where_it_was(captured):
    module, train, queries, trajectory = captured
    method = RepresenterPoints(weight_decay=1e-6, max_iterations=3)
    errors = []
    for _ in range(30):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            scores = Attributor(module, train, trajectory).score(method, queries)
        errors.append(scores.diagnostics["reconstruction_error"])
        if not said:
            break
        assert "ask again, which goes on from there" in str(said[0].message)
    assert 2 <= len(errors) < 30
    assert errors == sorted(errors, reverse=True)
    for file in (trajectory.path / "features").glob("*.head.arrow"):
        file.unlink()
    whole = Attributor(module, train, trajectory).score(RepresenterPoints(weight_decay=1e-6), queries)
    torch.testing.assert_close(scores.values, whole.values, rtol=1e-5, atol=1e-5 * float(whole.values.abs().max()))


def test_a_solve_stops_at_the_limit_of_time_and_goes_on_when_asked_again(captured):
    module, train, queries, trajectory = captured
    method = RepresenterPoints(weight_decay=1e-6)
    attributor = Attributor(module, train, trajectory)
    attributor.limit_seconds = 0.0
    with pytest.warns(UserWarning, match=r"at the limit of time after 1 Newton step.*`Attributor.limit_seconds`"):
        first = attributor.score(method, queries)
    attributor.limit_seconds = None
    assert attributor.score(method, queries).diagnostics["reconstruction_error"] < 1e-5
    assert first.diagnostics["reconstruction_error"] > 1e-5


def test_progress_of_the_solve_is_shown_up_to_its_end(monkeypatch):
    shown = []

    @contextlib.contextmanager
    def progress(total, label, unit="example"):
        assert (total, unit) == (100, "%")
        assert "the head `net.1`" in label
        yield shown.append

    with monkeypatch.context() as patched:
        patched.setattr("lightning_influence.attribution.driver.progress", lambda trainer, *a: both_kinds(progress, *a))
        Problem("softmax").score(RepresenterPoints())
    assert sum(shown) == 100
    assert len(shown) > 3


def both_kinds(progress, total, label, unit="example"):
    """The bar of the scores is not looked at."""
    return progress(total, label, unit) if unit == "%" else contextlib.nullcontext(lambda done: None)


def test_features_and_minimum_are_in_the_cost_until_they_are_stored(captured):
    module, train, queries, trajectory = captured
    attributor = Attributor(module, train, trajectory)

    def work(**options):
        """Whether the head is solved for, and how many forward passes are made."""
        pieces = {piece.what: piece for piece in attributor._cost(RepresenterPoints(**options), queries).work}
        return pieces["head's minimum"].seconds > 0, pieces["forward passes"].times

    new, stored = len(train) + len(queries), len(queries)
    assert work() == (True, new)
    assert work(refit=False) == (False, new)
    assert work(head="net.7") == (False, stored)  # refused when it is asked
    attributor.score(RepresenterPoints(), queries)
    assert work() == (False, stored)
    assert work(weight_decay=0.1) == (True, stored)


@pytest.mark.parametrize("held", [1, 2**26])
def test_features_that_do_not_fit_in_memory_are_read_again_in_each_pass(held, monkeypatch):
    monkeypatch.setattr(representer_points, "_HELD", held)
    problem = Problem("softmax")
    found = problem.score(RepresenterPoints(of=1)).values.sum(1)
    torch.testing.assert_close(found, (problem.asked @ problem.minimum().T)[:, 1])


def test_where_nothing_can_be_written_a_temporary_folder_serves_and_goes(captured, tmp_path, monkeypatch):
    module, train, queries, trajectory = captured
    expected = Attributor(module, train, trajectory).score(RepresenterPoints(), queries).values
    for file in (trajectory.path / "features").iterdir():
        file.unlink()
    (trajectory.path / "features").rmdir()
    (trajectory.path / "features").write_text("a file in the way")
    made = []

    class Kept(tempfile.TemporaryDirectory):
        def __init__(self, **options):
            super().__init__(dir=tmp_path, **options)
            made.append(Path(self.name))

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Kept)
    found = Attributor(module, train, trajectory).score(RepresenterPoints(), queries).values
    torch.testing.assert_close(found, expected)
    gc.collect()
    assert [folder.exists() for folder in made] == [False]  # as many as questions, and gone with them


def test_it_runs_at_the_end_of_a_fit(tmp_path):
    torch.manual_seed(0)
    data = both(5)
    influence = Influence([RepresenterPoints()], queries=data["queries"](), dirpath=tmp_path, self_influence=True)
    fit(Step(mlp()).double(), DataLoader(data["train"](), 4), influence, max_epochs=1)
    assert influence.scores["RepresenterPoints"].values.shape == (4, 8)
    assert float(influence.self_scores["RepresenterPoints"].values.min()) >= 0
    assert influence.attributor.cost(RepresenterPoints(), data["queries"]()) > 0


# ---- what cannot work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"weight_decay": 0.0},
            "Expected `weight_decay` to be a positive number, got 0.0. The decomposition divides by it",
        ),
        ({"weight_decay": -1.0}, "Expected `weight_decay` to be a positive number, got -1.0"),
        ({"weight_decay": float("nan")}, "Expected `weight_decay` to be a positive number, got nan"),
        ({"weight_decay": True}, "Expected `weight_decay` to be a positive number, got True"),
        ({"of": "class"}, "Expected `of` to be one of 'loss', 'label'.*got 'class'"),
        ({"of": -1}, "Expected `of` to be one of .*got -1"),
        ({"of": True}, "Expected `of` to be one of .*got True"),
        ({"target": "own"}, "Expected `target` to be one of 'labels', 'model', got 'own'"),
        ({"max_iterations": 0}, "Expected `max_iterations` to be a positive integer, got 0"),
        ({"max_iterations": True}, "Expected `max_iterations` to be a positive integer, got True"),
        ({"max_iterations": 1.5}, "Expected `max_iterations` to be a positive integer, got 1.5"),
    ],
)
def test_bad_settings_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        RepresenterPoints(**arguments)


class Reused(Step):
    def training_step(self, batch, batch_idx):
        hidden = self.net[0](batch[0])
        return self.loss(self.net[1](hidden) + self.net[1](hidden.tanh()), batch[1])


class Sequences(Step):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0][:, None].expand(-1, 2, -1)).mean(1), batch[1])


class Unused(Step):
    def training_step(self, batch, batch_idx):
        self.net[1](self.net[0](batch[0]))
        return self.loss(batch[0] @ self.net[0].weight.T, batch[1])


def exponential(z, y):
    return (-z.gather(1, y[:, None])).exp().mean()


TWO = lambda: nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))  # noqa: E731


@pytest.mark.parametrize(
    ("module", "method", "says"),
    [
        (lambda: Step(nn.Conv1d(5, 3, 1)), RepresenterPoints(), "Expected a model that ends in a linear layer"),
        (lambda: Step(TWO()), RepresenterPoints(head="net"), "to name a linear layer of Step, got 'net'.*`net.1`"),
        (lambda: Step(TWO()), RepresenterPoints(of=3), "Expected `of` to be a class below 3, got 3"),
        (lambda: Step(TWO(), exponential), RepresenterPoints(), "Expected cross-entropy, .* got another loss"),
        (lambda: Reused(TWO()), RepresenterPoints(), "`net.1` to be called once per batch, got 2 calls"),
        (lambda: Sequences(TWO()), RepresenterPoints(), r"`net.1` to give \[batch, class\] .* got shape \(8, 2, 3\)"),
        (lambda: Unused(TWO()), RepresenterPoints(), "a loss that depends on the linear layer `net.1`"),
    ],
    ids=["no linear layer", "a name of none", "no such class", "another loss", "reused", "sequences", "unused"],
)
def test_a_module_without_such_a_head_is_named(module, method, says):
    torch.manual_seed(0)
    data = both(5)
    module = module().double()
    if isinstance(module.net, nn.Conv1d):
        module.training_step = lambda batch, i: F.cross_entropy(module.net(batch[0][..., None])[..., 0], batch[1])
    with pytest.raises(ValueError, match=says):
        Attributor(module, data["train"]()).score(method, data["queries"]())


@pytest.mark.parametrize("example", [5, 7])
def test_examples_that_are_not_finite_are_named(example):
    problem = Problem("softmax", n=40)  # the probes look at 32 of them, the seventh not among these
    problem.train.items[example] = (problem.train.items[example][0] * torch.nan, problem.train.items[example][1])
    with pytest.raises(ValueError, match=rf"NaN or infinity for training examples \[{example}\]"):
        problem.score(RepresenterPoints())


def test_a_solve_that_stops_early_is_said():
    problem = Problem("softmax")
    with pytest.warns(UserWarning, match="stopped after 1 Newton step .* Raise `max_iterations`"):
        scores = problem.score(RepresenterPoints(max_iterations=1, weight_decay=1e-5))
    assert any("not quite sums over training examples" in note for note in scores.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.score(RepresenterPoints(weight_decay=1e-5))
