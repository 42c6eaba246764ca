"""The few passes before scoring: how many there are, and that they find what is wrong with a gradient."""

import operator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from case import Step, mlp
from cases_guard import MISSED, PATHS, OverTokens, token_labels
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from lightning_influence import Attributor, GradientDot, devices
from lightning_influence.gradients import Engine, digests, engine, sample
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.spot_checks import differing
from lightning_influence.module.task import Task
from lightning_influence.types import bytes_in, leaves_in, writable


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(600, 16), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.embedding(x)).mean(1))


class Tied(nn.Module):
    """The embedding is the output layer, too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(600, 16), nn.Linear(16, 600, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x).mean(1))


NETS = {
    "MLP": lambda: mlp(5, classes=3),
    "CNN": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)),
    "Transformer": Attention,
    "tied": Tied,
}


def data(name, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = {
        "MLP": lambda: torch.randn(n, 5, generator=g),
        "CNN": lambda: torch.randn(n, 1, 8, 8, generator=g),
        "Transformer": lambda: torch.randint(600, (n, 7), generator=g),
        "tied": lambda: torch.randint(600, (n, 7), generator=g),
    }[name]()
    return TensorDataset(x, torch.randint(3, (n,), generator=g))


@pytest.fixture
def passes(monkeypatch):
    """Sizes of the batches that the step was called with."""
    sizes, call = [], Task.__call__
    monkeypatch.setattr(Task, "__call__", lambda task, batch: sizes.append(len(batch[1])) or call(task, batch))
    return sizes


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request, monkeypatch):
    """Whether models are taken for large ones, of which fewer examples are checked."""
    if request.param:
        monkeypatch.setattr(sample, "_LARGE", 0)
    return request.param


@pytest.mark.parametrize("name", NETS)
def test_a_first_question_takes_few_passes_and_later_ones_take_none_before_scoring(name, large, passes):
    torch.manual_seed(0)
    asked = Attributor(Step(NETS[name]()), data(name, 200))
    queries = data(name, 20, 1)
    with asked.session(queries):
        first = list(passes)
    assert len(first) <= (8 if large else 20)
    assert sum(first) <= (10 if large else 32)
    passes.clear()
    with asked.session(queries):
        assert not passes
    with asked.session(data(name, 20, 2)):
        assert sum(passes) <= 4


class Switched(Step):
    """Its loss is another one in training mode."""

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1]) * (2.0 if self.training else 1.0)


@pytest.mark.parametrize("kind", [Step, Switched])
def test_the_other_mode_is_tried_only_if_the_step_reads_it(kind, passes):
    torch.manual_seed(0)
    module = kind(mlp(5, classes=3))
    asked, modes = Attributor(module, data("MLP", 30)), []
    module.net.register_forward_hook(lambda *_: modes.append(vars(module)["training"]))
    with asked.session() as setting:
        assert any(modes) == (kind is Switched) == any("training mode" in note for note in setting.notes)
    assert "training" not in vars(kind)


class Sorted(Step):
    """It sorts the examples of a batch, which changes nothing among training examples that are in this order."""

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.net(x[order])[order.argsort()]


@pytest.mark.usefixtures("large")
def test_queries_that_are_unlike_the_training_examples_are_right():
    torch.manual_seed(0)
    module, (train, queries) = Sorted(mlp(5, classes=3)).double(), (data("MLP", n, n) for n in (40, 9))
    x = train.tensors[0].double()
    train, queries = (
        TensorDataset(x[x[:, 0].argsort()], train.tensors[1]),
        TensorDataset(queries.tensors[0].double(), queries.tensors[1]),
    )
    found = Attributor(module, train).score(GradientDot(), queries).values
    names = [name for name, _ in module.named_parameters()]
    sides = [oracles.rows(module, [default_collate([d[i]]) for i in range(len(d))], names) for d in (queries, train)]
    expected = sum(sides[0][name].flatten(1) @ sides[1][name].flatten(1).T for name in names)
    oracles.assert_scores(found, expected, 1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_a_later_question_checks_again_what_has_changed_only(path, passes):
    torch.manual_seed(0)
    module, train = OverTokens(PATHS[path](mlp(5, classes=3))).double(), token_labels(())()
    asked = Attributor(module, train, batch_size=16)
    asked.self_influence(GradientDot())
    before, found = len(passes), {}
    passes.clear()
    asked.self_influence(GradientDot())
    assert len(passes) < before
    assert path != "factored" or passes.count(1) <= 1
    x, y = train.items[MISSED]
    train.items[MISSED] = x, torch.where(torch.arange(len(y)) < 2, y, -100)
    for name, fresh in (("later", asked), ("first", Attributor(module, train, batch_size=16))):
        found[name] = fresh.self_influence(GradientDot())
    assert any("mean over its tokens" in note for note in found["later"].notes)
    torch.testing.assert_close(found["later"].values, found["first"].values, rtol=1e-9, atol=0.0)


class Penalised(Step):
    """The penalty counts once a batch, and is of the parameters that are trained."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(self(batch[0]), batch[1])
        return loss + 0.01 * sum(p.square().sum() for p in self.parameters() if p.requires_grad)


@pytest.mark.parametrize("names", [None, ["net.2.weight"]])
def test_a_step_that_asks_which_parameters_are_trained_is_right(names):
    torch.manual_seed(0)
    module, train = Penalised(mlp(5, classes=3)).double(), data("MLP", 30)
    train = TensorDataset(train.tensors[0].double(), train.tensors[1])
    found = Attributor(module, train, parameters=names).self_influence(GradientDot())
    names = names or [name for name, _ in module.named_parameters()]
    ones = [default_collate([train[i]]) for i in range(len(train))]
    oracles.assert_scores(found.values, oracles.squared(oracles.rows(module, ones, names)), 1e-10)


# ---- a wrong gradient is found -------------------------------------------------------------------------------------


def without_bias(names, part):
    pairs = zip(names, part.dense(), strict=True)
    return DenseRows(tuple(torch.zeros_like(rows) if name.endswith("bias") else rows for name, rows in pairs))


def of_other_rows(names, part):
    return DenseRows(tuple(rows.roll(1, 0) for rows in part.dense()))


def too_large(names, part):
    return part.scaled(torch.full((len(part),), 1.001, dtype=torch.float64))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("small", [2**12, 8])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("fault", [without_bias, of_other_rows, too_large])
def test_no_wrong_layer_rule_goes_unseen(fault, name, small, monkeypatch):
    monkeypatch.setattr(digests, "_SMALL", small)
    parts_of = Engine.parts_of

    def wrong(self, *args):
        found, failed = parts_of(self, *args)
        return {names: fault(names, part) for names, part in found.items()}, failed

    monkeypatch.setattr(Engine, "parts_of", wrong)
    torch.manual_seed(0)
    with Attributor(Step(NETS[name]()), data(name, 30)).session() as setting:
        plan = setting.engine.plan
        assert not [n for n in plan.layouts if fault is not without_bias or n.endswith("bias")]


@pytest.mark.usefixtures("large")
def test_a_tied_use_that_counts_once_is_seen(monkeypatch):
    monkeypatch.setattr(engine, "sum_of", operator.itemgetter(0))
    torch.manual_seed(0)
    with Attributor(Step(Tied()), data("tied", 30)).session() as setting:
        assert not setting.engine.plan.layouts


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", NETS)
def test_a_rule_that_is_wrong_for_queries_alone_is_seen(name, monkeypatch):
    torch.manual_seed(0)
    asked = Attributor(Step(NETS[name]()), data(name, 30))
    with asked.session():
        parts_of = Engine.parts_of
    monkeypatch.setattr(
        Engine,
        "parts_of",
        lambda self, *args: ({n: of_other_rows(n, part) for n, part in parts_of(self, *args)[0].items()}, []),
    )
    with asked.session(data(name, 20, 1)) as setting:
        assert not setting.queries.engine.plan.layouts


# ---- large parameters are compared by random combinations ----------------------------------------------------------


@pytest.fixture
def shortened(monkeypatch):
    monkeypatch.setattr(digests, "_SMALL", 8)


def one_row(gradient):
    gradient[0] = 0


def permuted(gradient):
    gradient[:] = gradient.flip(0).clone()


def scaled(gradient):
    gradient *= 1 + 2e-3


def one_entry(gradient):
    gradient.flatten()[3] += 0.01 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 40), (300,), (4, 3, 5, 5), (40, 1)])
@pytest.mark.parametrize("fault", [one_row, permuted, scaled, one_entry])
@pytest.mark.usefixtures("shortened")
def test_a_wrong_gradient_has_another_digest(fault, shape, dtype):
    g = torch.Generator().manual_seed(0)
    truth, digester = torch.randn(3, *shape, generator=g, dtype=dtype), digests.Digester(devices.Readings())
    rounded = truth * (1 + 4 * torch.finfo(dtype).eps * torch.rand(truth.shape, generator=g, dtype=dtype))
    wrong = truth.clone()
    fault(wrong[1])
    for row in range(3):
        of_truth = digester.of({"p": truth[row]})
        for rows, right in ((truth, True), (rounded, True), (wrong, row != 1)):
            found = {"p": digester.of({"p": rows[row]}).values["p"][None]}
            assert (digests.agreeing([(found, 0, of_truth)], {"p"}) == {"p"}) == right


# ---- examples of which there are few -------------------------------------------------------------------------------


class MixesRare(Step):
    """Examples of a rare class are centred by their batch."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x - (y == 2)[:, None] * x.mean(0)), y)


class BranchesOnRare(Step):
    """An example of a rare class changes the loss of its whole batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return 2 * loss if (batch[1] == 2).any() else loss


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("kind", "size"), [pytest.param(MixesRare, 300, marks=pytest.mark.slow), (BranchesOnRare, 16)])
def test_a_rare_class_by_which_a_batch_is_computed_otherwise_is_refused(kind, size):
    torch.manual_seed(0)
    x, y = data("MLP", 300).tensors
    y = torch.where(y == 2, 0, y)
    y[[37, 211]] = 2
    with pytest.raises(ValueError, match="to weigh in its batch as it does alone"):
        Attributor(kind(mlp(5, classes=3)), TensorDataset(x, y), batch_size=size).self_influence(GradientDot())


def test_blocks_that_branch_in_the_same_way_are_checked_once(passes):
    class Branches(Step):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if loss.isfinite() else 0 * loss

    torch.manual_seed(0)
    counts = []
    for kind in (Step, Branches):
        passes.clear()
        Attributor(kind(mlp(5, classes=3)), data("MLP", 300), batch_size=16).self_influence(GradientDot())
        counts.append(passes.count(1))
    assert counts[1] <= counts[0] + 2


def test_what_an_interrupted_question_named_is_looked_at_in_the_next():
    class Interrupted(torch.utils.data.Dataset):
        interrupts = False

        def __len__(self):
            return len(y)

        def __getitem__(self, i):
            if self.interrupts and i == len(y) - 1:
                raise KeyboardInterrupt
            return x[i], y[i]

    torch.manual_seed(0)
    x, y = data("MLP", 100).tensors
    y[y == 2] = 0
    train = Interrupted()
    asked = Attributor(MixesRare(mlp(5, classes=3)), train, batch_size=16)
    asked.self_influence(GradientDot())
    y[50], train.interrupts = 2, True
    with pytest.raises(KeyboardInterrupt):
        asked.self_influence(GradientDot())
    train.interrupts = False
    with pytest.raises(ValueError, match="Expected"):
        asked.self_influence(GradientDot())


def test_parts_that_refer_to_one_another_are_opened_once():
    atoms = [SimpleNamespace(x=torch.full((2,), float(i)), bonds=[]) for i in range(60)]
    for atom in atoms:
        atom.bonds = atoms
    assert sorted(float(leaf[0]) for leaf in leaves_in({"atoms": atoms})) == list(range(60))
    slotted = dataclass(slots=True)(type("Slotted", (), {"__annotations__": {"x": object}}))(np.ones(3))
    assert [leaf.tolist() for leaf in leaves_in([slotted])] == [[1, 1, 1]]
    assert writable(slotted)
    shared = torch.zeros(100)
    assert bytes_in([SimpleNamespace(dataset=shared), SimpleNamespace(dataset=shared)]) == 400


def test_a_small_gradient_that_is_missing_is_seen_in_float16():
    truth = {"a": torch.full((3,), 1e-5, dtype=torch.float16), "b": torch.full((3,), 1e-5, dtype=torch.float16)}
    assert differing({"a": truth["a"]}, truth) == "b"
