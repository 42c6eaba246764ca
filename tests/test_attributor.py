"""The driver: what a user asks, how it is cut into blocks and tiles, and every bad input with its way out."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from case import Step
from fits import QUIET
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_influence import (
    Attributor,
    Evidence,
    GradientDot,
    Influence,
    InfluenceFunction,
    Method,
    MissingEvidence,
    SelfScores,
    TracInCP,
    Trajectory,
)
from lightning_influence.gradients.transforms import scale
from lightning_influence.methods import method
from lightning_influence.scores.words import news
from lightning_influence.setting import setting as questions
from lightning_influence.setting.setting import Setting


class Net(pl.LightningModule):
    def __init__(self, width=6):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3)).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(n, 4, generator=draw, dtype=torch.float64), torch.randint(0, 3, (n,), generator=draw)
    )


TRAIN, QUERIES = data(23), data(7, seed=1)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    torch.manual_seed(0)
    net, influence = Net(), Influence(dirpath=tmp_path_factory.mktemp("run"))
    pl.Trainer(**QUIET, max_epochs=3, callbacks=[influence]).fit(net, DataLoader(TRAIN, 5, shuffle=True))
    return net, influence


def test_an_attributor_and_a_trajectory_say_what_they_are_of(fitted):
    net, influence = fitted
    told = repr(influence.trajectory)
    fit = "a fit of 15 steps on 23 training examples, finished; 4 checkpoints (steps 0 to 15)"
    assert told == f"Trajectory in {str(influence.run_dir)!r}: {fit}"
    assert repr(influence.attributor) == f"Attributor of Net and 23 training examples\n  {told}"
    assert "no trajectory" in repr(Attributor(net, TRAIN))


def rows(net, dataset):
    """One backward pass an example."""
    found = []
    for x, y in dataset:
        loss = F.cross_entropy(net.net(x[None]), y[None])
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    return torch.stack(found)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_scores_equal_one_backward_pass_an_example(fitted):
    net, _ = fitted
    scores = Attributor(net, TRAIN).score(GradientDot(), QUERIES)
    close(scores.values, rows(net, QUERIES) @ rows(net, TRAIN).T)
    assert scores.train_ids.tolist() == list(range(23))
    assert scores.query_ids.tolist() == list(range(7))


def test_self_influence_is_the_diagonal(fitted):
    _, influence = fitted
    attributor = influence.attributor
    close(attributor.self_influence(TracInCP()).values, attributor.score(TracInCP(), "train").values.diagonal())


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
@pytest.mark.parametrize(("tile", "held"), [(2**25, 2**29), (40, 2**29), (2**25, 1), (40, 2000)])
def test_blocks_and_tiles_change_nothing(fitted, monkeypatch, batch_size, tile, held):
    net, influence = fitted
    expected = influence.attributor.score(TracInCP(), QUERIES).values
    monkeypatch.setattr(method, "TILE", tile)
    monkeypatch.setattr(questions, "GRADIENT_BYTES", held)
    attributor = Attributor(net, TRAIN, influence.trajectory, batch_size=batch_size)
    close(attributor.score(TracInCP(), QUERIES).values, expected)
    top = attributor.score(TracInCP(), QUERIES, top_k=4)
    close(top.proponents(4).scores, expected.sort(descending=True).values[:, :4])
    close(top.opponents(4).scores, expected.sort().values[:, :4])
    assert top.proponents(4).train_ids.tolist() == expected.sort(descending=True).indices[:, :4].tolist()


def test_the_mean_of_queries_is_one_query(fitted):
    _, influence = fitted
    attributor = influence.attributor
    mean = attributor.score(TracInCP(), QUERIES, aggregate="mean")
    close(mean.values, attributor.score(TracInCP(), QUERIES).values.mean(0, keepdim=True))
    assert len(mean) == 1


def test_the_mean_query_is_normalised_as_one(fitted):
    net, _ = fitted
    scores = Attributor(net, TRAIN).score(GradientDot(normalize="cosine"), QUERIES, aggregate="mean").values
    query, train = rows(net, QUERIES).mean(0, keepdim=True), rows(net, TRAIN)
    close(scores, F.normalize(query) @ F.normalize(train).T)


def test_fresh_scores_have_their_data_at_hand(fitted):
    attributor = fitted[1].attributor
    scores = attributor.score(TracInCP(), QUERIES)
    assert scores.at_hand == (TRAIN, QUERIES)
    assert attributor.score(TracInCP(), QUERIES, aggregate="mean").at_hand == (TRAIN, None)
    assert attributor.self_influence(TracInCP()).at_hand == (TRAIN, None)


def test_a_group_is_the_sum_of_its_members(fitted):
    _, influence = fitted
    attributor = influence.attributor
    close(attributor.group(TracInCP(), [3, 9, 20], QUERIES), attributor.score(TracInCP(), QUERIES).group([3, 9, 20]))


def test_a_measurement_takes_the_place_of_the_loss(fitted):
    net, _ = fitted

    def margin(module, batch):
        x, y = batch
        logits = module.net(x)
        return logits.gather(1, y[:, None])[:, 0] - logits.mean(1)

    attributor = Attributor(net, TRAIN)
    low = attributor.score(GradientDot(), QUERIES, measurement=margin).values
    high = attributor.score(GradientDot(), QUERIES, measurement=margin, higher_is_better=True).values
    gradients = []
    for x, y in QUERIES:
        value = margin(net, (x[None], y[None])).sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))]))
    close(low, torch.stack(gradients) @ rows(net, TRAIN).T)
    close(high, -low)


def alone(net, examples):
    return torch.stack([F.cross_entropy(net.net(x[None]), y[None]) for x, y in examples]).detach()


def test_losses_are_those_of_the_examples_alone(fitted):
    net, _ = fitted
    close(Attributor(net, TRAIN).losses().values, alone(net, TRAIN))
    close(Attributor(net, TRAIN).losses(QUERIES).values, alone(net, QUERIES))


def test_losses_are_a_ranked_list_like_any_other(fitted, tmp_path):
    _, influence = fitted
    net, expected, after = Net(), torch.zeros(len(TRAIN)).double(), influence.trajectory.checkpoints[1:]
    for checkpoint in after:
        net.load_state_dict(checkpoint.load().parameters)
        expected += alone(net, TRAIN) / len(after)
    mean = influence.attributor.losses(checkpoints="all", path=tmp_path / "mean.arrow")
    close(mean.values, expected)
    assert mean.top(3).train_ids.tolist() == expected.argsort(descending=True)[:3].tolist()
    saved = SelfScores.load(tmp_path / "mean.arrow")
    assert (saved.quantity, saved.method, saved.units) == ("loss", "labels", "loss")
    assert saved.checkpoints == tuple(point.step for point in after)
    assert f"labels: mean loss over {len(after)} checkpoints, 23 training examples" in repr(saved)
    assert saved.plot()[1].get_xlabel() == f"mean loss over {len(after)} checkpoints"
    with pytest.raises(MissingEvidence):
        Attributor(net, TRAIN).losses(checkpoints="all")
    with pytest.raises(ValueError, match="positions, 'all' or None, got 'last'"):
        influence.attributor.losses(checkpoints="last")


def unmasked(module, batch):
    """Counts padding as input: an example beside a longer one has another loss than alone."""
    return F.cross_entropy(module.net(batch[0].sum(1)), batch[1], reduction="none") * batch[0].shape[1]


def padded(rows):
    x, y = zip(*rows, strict=True)
    return torch.nn.utils.rnn.pad_sequence(x, batch_first=True), torch.stack(y)


def test_losses_of_examples_that_are_padded_in_a_block_are_still_those_alone():
    draw, net = torch.Generator().manual_seed(0), Net()
    lengths = [4, 4, 4, 4, 4, 2, 4, 3, 4]
    rows = [(torch.randn(n, 4, generator=draw, dtype=torch.float64), torch.tensor(n % 3)) for n in lengths]
    expected = torch.cat([unmasked(net, (x[None], y[None])) for x, y in rows]).detach()
    close(Attributor(net, DataLoader(rows, 4, collate_fn=padded), loss=unmasked).losses().values, expected)


def test_losses_that_are_not_finite_are_refused_by_name(fitted):
    net, _ = fitted
    inputs = TRAIN.tensors[0].clone()
    inputs[4] = torch.nan
    with pytest.raises(ValueError, match=r"Expected finite losses, got NaN or infinity for training examples \[4\]"):
        Attributor(net, TensorDataset(inputs, TRAIN.tensors[1])).losses()


def test_a_fresh_process_asks_the_same(fitted):
    _, influence = fitted
    expected = influence.attributor.score(TracInCP(), QUERIES).values
    later = Attributor(Net(), TRAIN, Trajectory.load(influence.run_dir))
    close(later.score(TracInCP(), QUERIES).values, expected)


def test_parameters_are_chosen_by_pattern(fitted):
    net, _ = fitted
    last = Attributor(net, TRAIN, parameters="net.2.*").score(GradientDot(), QUERIES).values
    close(last, rows(net, QUERIES)[:, -21:] @ rows(net, TRAIN)[:, -21:].T)


def test_subsets_name_their_base(fitted):
    net, _ = fitted
    scores = Attributor(net, Subset(TRAIN, [5, 9, 2])).score(GradientDot(), Subset(Subset(QUERIES, [6, 1, 0]), [2, 0]))
    base = scores.base_ids()
    assert base.train_ids.tolist() == [5, 9, 2]
    assert base.query_ids.tolist() == [0, 6]


def test_scores_are_saved_where_asked(fitted, tmp_path):
    net, _ = fitted
    attributor = Attributor(net, TRAIN)
    scores = attributor.score(GradientDot(), QUERIES, path=tmp_path / "scores.arrow")
    attributor.self_influence(GradientDot(), path=tmp_path / "self.arrow")
    assert torch.equal(type(scores).load(tmp_path / "scores.arrow").values, scores.values)
    assert (tmp_path / "self.arrow").is_file()


class Telling(GradientDot):
    """Tells a residual of each tile, as a solver would."""

    def score(self, setting, queries):
        setting.diagnostic("residual", torch.tensor(1.0 / (1 + setting.ids.start)))
        setting.diagnostic("ids_seen", len(setting.ids), keep=lambda old, new: old + new)
        return super().score(setting, queries)

    def self_influence(self, setting):
        setting.diagnostic("residual", 0.5)
        return super().self_influence(setting)


def test_what_a_method_tells_in_figures_is_in_the_answer(fitted, monkeypatch):
    net, _ = fitted
    monkeypatch.setattr(method, "TILE", 40)
    attributor = Attributor(net, TRAIN, batch_size=5)
    assert attributor.score(Telling(), QUERIES).figures == {"residual": 1.0, "ids_seen": 23.0}
    assert attributor.self_influence(Telling()).figures == {"residual": 0.5}
    assert attributor.score(GradientDot(), QUERIES).figures == {}


@pytest.mark.parametrize("told", [(1.0, float("nan")), (float("nan"), 1.0)])
def test_a_figure_that_was_nan_stays_nan(told):
    setting = Setting(None, (), range(0), None)
    for value in told:
        setting.diagnostic("residual", value)
    assert setting.diagnostics["residual"] != setting.diagnostics["residual"]


def test_the_estimate_of_cost_is_a_time(fitted):
    _, influence = fitted
    attributor = influence.attributor
    assert 0 < attributor.cost(TracInCP()) < 60
    assert 0 < attributor.cost(TracInCP(), QUERIES) < 60
    assert 0 < attributor.cost(TracInCP(), QUERIES, aggregate="mean") < 60


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TRAIN)


@dataclass(frozen=True)
class Watches(Method):
    needs = Evidence.TRACKER

    def score(self, setting, queries):
        raise NotImplementedError


class Refits(Watches):
    needs = Evidence.REFIT


class Misshapen(Watches):
    needs = Evidence.FINAL_WEIGHTS

    def score(self, setting, queries):
        return setting.zeros()

    def hyperparameters(self):
        return {}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"train": Subset(TRAIN, [])},
            ValueError,
            r"Expected `train` to hold at least one example, got an empty Subset",
        ),
        ({"train": Stream()}, TypeError, r"Expected `train` to be a map-style Dataset .* got Stream"),
        ({"train": DataLoader(Stream(), 2)}, TypeError, r"Expected `train` to be a map-style Dataset .* got Stream"),
        (
            {"train": DataLoader(TRAIN, batch_size=None)},
            TypeError,
            r"collates examples into batches, got `batch_size=None`",
        ),
        (
            {"train": [DataLoader(TRAIN), DataLoader(TRAIN)]},
            TypeError,
            r"got list.*for several loaders at once, the one whose examples are meant, with `loss=`",
        ),
        (
            {"module": Step(torch.nn.ParameterList([torch.ones(3, dtype=torch.complex64)]))},
            ValueError,
            r"Expected real parameters, got complex numbers in `net\.0`\. Leave them out with `parameters=`",
        ),
        ({"train": 3}, TypeError, r"Expected `train` to be a map-style Dataset or a DataLoader of one, got int"),
        (
            {"train": TRAIN[0]},
            TypeError,
            r"got a tuple of unlike parts, which looks like one example\. Pass `\[example",
        ),
        ({"batch_size": 0}, ValueError, r"Expected `batch_size` to be a positive integer or None, got 0"),
        ({"batch_size": True}, ValueError, r"Expected `batch_size` to be a positive integer or None, got True"),
        ({"parameters": ["nett.*"]}, ValueError, r"got 'nett\.\*', which matches none of net\.0\.weight"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        Attributor(**({"module": Net(), "train": TRAIN} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"method": "TracInCP"},
            TypeError,
            r"a Method such as `TracInCP\(\)`, got 'TracInCP'. Write `TracInCP\(\)`, wi",
        ),
        ({"method": GradientDot}, TypeError, r"got <class .*GradientDot'>\. Make one: `GradientDot\(\)`\."),
        ({"method": InfluenceFunction}, TypeError, r"Make one: `InfluenceFunction\(EKFAC\(\)\)`\."),
        ({"measurement": lambda module, batch: module(batch[0]).sum()}, ValueError, "Both are built alike: look at"),
        ({"method": QUERIES}, TypeError, r"The method comes first, then the queries: `score\(TracInCP\(\), queries\)`"),
        ({"top_k": 0}, ValueError, r"Expected `top_k` to be a positive integer or None, got 0"),
        ({"aggregate": "sum"}, ValueError, r"Expected `aggregate` to be None or 'mean', got 'sum'"),
        ({"higher_is_better": True}, ValueError, r"Expected `measurement=` with `higher_is_better=True`"),
        ({"queries": "val"}, ValueError, r"Expected `queries` to be a Dataset, a DataLoader or 'train', got 'val'"),
        ({"queries": Subset(TRAIN, [])}, ValueError, r"Expected `queries` to hold at least one example"),
        ({"queries": None}, TypeError, r"Expected `queries` to be a Dataset or a DataLoader, got None"),
        ({"method": TracInCP()}, MissingEvidence, r"`TracInCP` needs checkpoints .* got `trajectory=None`"),
        (
            {"method": Watches()},
            MissingEvidence,
            r"`Watches\(\.\.\.\)` with these hyper-parameters follows a fit while it runs",
        ),
        (
            {"method": Refits()},
            MissingEvidence,
            r"`Refits` retrains models, got `refit=None`. Pass `Attributor\(\.\.\., refit=",
        ),
        ({"method": Misshapen()}, ValueError, r"`Misshapen\.score` to return \[query, train\] = \[7, 23\], got \[23\]"),
        (
            {"queries": TensorDataset(torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))},
            ValueError,
            r"Expected queries that the module's loss accepts .*\[\(1, 4\) float64, .*\), got \[\(1, 5\) float64, ",
        ),
    ],
)
def test_bad_questions_are_refused(arguments, error, text):
    attributor = Attributor(Net(), TRAIN)
    with pytest.raises(error, match=text):
        attributor.score(**({"method": GradientDot(), "queries": QUERIES} | arguments))


def test_self_influence_that_would_be_constant_is_refused():
    with pytest.raises(ValueError, match=r"Expected `normalize=None` for self-influence, got 'cosine'"):
        Attributor(Net(), TRAIN).self_influence(GradientDot(normalize="cosine"))


@pytest.mark.parametrize("normalize", ["cosine", "layerwise"])
def test_the_scale_of_cosines_is_told(normalize):
    (note,) = (
        note for note in Attributor(Net(), TRAIN).score(GradientDot(normalize), QUERIES).notes if "from -1" in note
    )
    assert note.startswith("Scores are ")
    assert "to 1" in note
    assert note.endswith("; the size of a gradient does not count.")
    assert not news([note])  # which is so of every such question
    assert "learning rates as weights" in scale(normalize, weighted=True)


def test_a_method_without_self_influence_says_which_has():
    with pytest.raises(NotImplementedError, match=r"`Misshapen` has no self-influence\. Use `TracInCP\(\)`"):
        Attributor(Net(), TRAIN).self_influence(Misshapen())


def test_ids_of_a_group_must_exist():
    with pytest.raises(ValueError, match=r"Expected `ids` from 0 to 22, got \[23\]"):
        Attributor(Net(), TRAIN).group(GradientDot(), [1, 23], QUERIES)


@pytest.mark.parametrize("ids", [torch.arange(23) < 3, [1.5], "3", ["a"]])
def test_ids_of_a_group_must_be_whole_numbers(ids):
    attributor = Attributor(Net(), TRAIN)
    scores = attributor.score(GradientDot(), QUERIES)
    for ask in (lambda: attributor.group(GradientDot(), ids, QUERIES), lambda: scores.group(ids)):
        with pytest.raises(TypeError, match=r"`ids` to be whole numbers, got (torch\.(bool|float32)|'3'|\['a'\])"):
            ask()


def test_another_dataset_length_is_refused(fitted):
    net, influence = fitted
    with pytest.raises(ValueError, match=r"Expected `train` to have the 23 examples .* got 7"):
        Attributor(net, QUERIES, influence.trajectory)


def test_checkpoints_of_another_model_are_refused(fitted):
    _, influence = fitted
    other = r"Expected checkpoints of this Net, .*`net\.0\.weight` \(6, 4\) \(module: \(5, 4\)\)"
    with pytest.raises(ValueError, match=other):  # before anything is read but the head of a file
        Attributor(Net(width=5), TRAIN, influence.trajectory)
    last = influence.trajectory.checkpoints[-1]
    assert last.shapes() == {name: tuple(value.shape) for name, value in last.load().parameters.items()}
    assert replace(last, path=Path("nowhere")).shapes() == {}


def test_a_frozen_module_is_refused():
    with pytest.raises(ValueError, match=r"Expected parameters that train, got none"):
        Attributor(Net().requires_grad_(False), TRAIN)


@pytest.mark.parametrize(
    ("train", "queries", "text"), [(True, False, r"training examples \[11\]"), (False, True, r"queries \[4\]")]
)
def test_gradients_that_are_not_finite_are_named(train, queries, text):
    bad, asked = data(23), data(7, seed=1)
    if train:
        bad.tensors[0][11, 0] = torch.nan
    if queries:
        asked.tensors[0][4, 0] = torch.inf
    with pytest.raises(ValueError, match=r"Expected finite gradients, got NaN or infinity for " + text):
        Attributor(Net(), bad).score(GradientDot(), asked)
    if train:
        with pytest.raises(ValueError, match=r"NaN or infinity for training examples \[11\]"):
            Attributor(Net(), bad).self_influence(GradientDot())


@pytest.mark.parametrize("checkpoints", [(-1,), (1, 2)])
def test_chosen_checkpoints_are_used_and_recorded(fitted, checkpoints):
    _, influence = fitted
    scores = influence.attributor.score(TracInCP(checkpoints=checkpoints), QUERIES)
    assert len(scores.checkpoints) == len(checkpoints)


def test_checkpoints_that_do_not_exist_are_refused(fitted):
    _, influence = fitted
    with pytest.raises(ValueError, match=r"Expected `checkpoints` to be positions in the list of 4, got \[7\]"):
        influence.attributor.score(TracInCP(checkpoints=(7,)), QUERIES)


@pytest.mark.parametrize("arguments", [{"normalize": "unit"}, {"units": "eta"}])
def test_settings_of_methods_are_checked(arguments):
    with pytest.raises(ValueError, match=r"Expected `(normalize|units)` to be one of"):
        TracInCP(**arguments)
