"""The few passes before scoring: how many there are, and that they find what is wrong with a gradient."""

import oracles
import pytest
import torch
from case import Step, mlp
from cases_guard import MISSED, PATHS, OverTokens, token_labels
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from lightning_influence import Attributor, GradientDot
from lightning_influence.gradients import Engine, digests
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.module.task import Task


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(600, 16), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.embedding(x)).mean(1))


NETS = {
    "MLP": lambda: mlp(5, classes=3),
    "CNN": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)),
    "Transformer": Attention,
}


def data(name, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = {
        "MLP": lambda: torch.randn(n, 5, generator=g),
        "CNN": lambda: torch.randn(n, 1, 8, 8, generator=g),
        "Transformer": lambda: torch.randint(600, (n, 7), generator=g),
    }[name]()
    return TensorDataset(x, torch.randint(3, (n,), generator=g))


@pytest.fixture
def passes(monkeypatch):
    """Sizes of the batches that the step was called with."""
    sizes, call = [], Task.__call__
    monkeypatch.setattr(Task, "__call__", lambda task, batch: sizes.append(len(batch[1])) or call(task, batch))
    return sizes


@pytest.mark.parametrize("name", NETS)
def test_a_first_question_takes_few_passes_and_later_ones_take_none_before_scoring(name, passes):
    torch.manual_seed(0)
    asked = Attributor(Step(NETS[name]()), data(name, 200))
    queries = data(name, 20, 1)
    with asked.session(queries):
        first = list(passes)
    assert len(first) <= 28
    assert sum(first) <= 48
    passes.clear()
    with asked.session(queries):
        assert not passes
    with asked.session(data(name, 20, 2)):
        assert sum(passes) <= 16


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
    truth, digester = torch.randn(3, *shape, generator=g, dtype=dtype), digests.Digester()
    rounded = truth * (1 + 4 * torch.finfo(dtype).eps * torch.rand(truth.shape, generator=g, dtype=dtype))
    wrong = truth.clone()
    fault(wrong[1])
    for row in range(3):
        of_truth = digester.of({"p": truth[row]})
        for rows, right in ((truth, True), (rounded, True), (wrong, row != 1)):
            found = {"p": digester.of({"p": rows[row]}).values["p"][None]}
            assert all(same for _, same in digests.agreements(found, 0, of_truth, {"p"})) == right
