"""The spot checks: on every path, for blocks of one too, and repeated in float64 where rounding made them fail."""

import warnings

import oracles
import pytest
import torch
from case import Items, Step, drawn, mlp
from cases_guard import KINDS, MET, MISSED, PATHS, ByImportance, MeanWithin, classes, importances, token_labels
from test_cases import untouched
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset, default_collate

from lightning_influence import Attributor, GradientDot
from lightning_influence.data.examples import Block, Examples
from lightning_influence.gradients import Engine
from lightning_influence.gradients.guard import Guard, checks_of
from lightning_influence.gradients.token_probe import GradientProbe

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.fixture
def nothing_counted(monkeypatch):
    """Otherwise most of these losses are recognised as means over tokens, and scored."""
    monkeypatch.setattr(GradientProbe, "holds", lambda *arguments, **options: True)
    monkeypatch.setattr(GradientProbe, "counter", lambda *arguments: None)


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("odd", [MISSED, 70])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("nothing_counted")
def test_the_one_example_unlike_the_others_is_named(kind, path, odd, size):
    step, net, data, _, unusual = KINDS[kind]
    module = step(PATHS[path](net())).double()
    asked = Attributor(module, data((odd,))(), batch_size=size)
    with untouched(module), pytest.raises(ValueError, match=f"Expected example {odd} to weigh in its batch") as caught:
        asked.self_influence(GradientDot())
    assert unusual in str(caught.value)


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("path", PATHS)
def test_a_mean_within_each_example_is_right_whatever_its_length(path, size):
    module = MeanWithin(PATHS[path](mlp())).double()
    data = token_labels((MET, MISSED))()
    found = Attributor(module, data, batch_size=size).self_influence(GradientDot())
    names = [name for name, _ in module.named_parameters()]
    ones = [default_collate([data[i]]) for i in range(len(data))]
    oracles.assert_scores(found.values, oracles.squared(oracles.rows(module, ones, names)), 1e-10)
    assert not any("compared with those" in note for note in found.notes)


@pytest.mark.parametrize("path", ["torch.func", "one by one"])
def test_queries_may_have_any_lengths_where_they_are_not_run_as_a_batch(path):
    step, net, data, *_ = KINDS["ignore_index"]
    module = step(PATHS[path](net())).double()
    train, queries = data(())(), data((1,), 4, 2)()
    found = Attributor(module, train, batch_size=8).score(GradientDot(), queries).values
    names = [name for name, _ in module.named_parameters()]
    ones = [[default_collate([d[i]]) for i in range(len(d))] for d in (train, queries)]
    oracles.assert_scores(found, oracles.tracin(module, *ones, names, [(None, torch.ones(1, 80))]), 1e-10)


# ---- rounding -------------------------------------------------------------------------------------------------------


class Rounds(nn.Module):
    """As much noise as rounding makes, other in a batch than alone; at a kink it decides."""

    def forward(self, x):
        return x + 4 * torch.finfo(x.dtype).eps * (len(x) - 1)


class Kinked(Step):
    """Some examples stand at the kink of a ReLU: alone below it, in a batch above."""

    def __init__(self, net=None):
        super().__init__(net or nn.Sequential(Rounds(), nn.ReLU(), nn.Linear(5, 3)))
        self.shift = nn.Parameter(-torch.ones(5))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0] + self.shift), batch[1])


class Only32(Kinked):
    def training_step(self, batch, batch_idx):
        assert self.shift.dtype is torch.float32
        return super().training_step(batch, batch_idx)


def at_kink(at, n=64):
    g = drawn(3)
    x, y = torch.randn(n, 5, generator=g), torch.randint(3, (n,), generator=g)
    x[list(at), 0] = 1.0
    return TensorDataset(x, y)


SELF_CHECKED = 0  # one of the self-check's eight


@pytest.mark.parametrize("kind", [Kinked, Only32])
@pytest.mark.parametrize("at", [[7919 % 64], [SELF_CHECKED], list(range(64))])
def test_rounding_at_a_kink_is_no_refusal_and_no_slow_path(kind, at, monkeypatch):
    choose = Guard.choose
    monkeypatch.setattr(
        Guard, "choose", lambda self, block: ({**choose(self, block)[0], 7919 % block.size: None}, True)
    )
    module = kind()
    if kind is Only32 and at != [7919 % 64]:
        pytest.skip("without float64 a parameter may take a slow path")
    with untouched(module):
        found = Attributor(module, at_kink(at), batch_size=64).self_influence(GradientDot())
    assert any("all 23 parameters were computed the fast way" in note for note in found.notes)
    if at != [SELF_CHECKED]:
        assert any("differed by rounding errors" in note for note in found.notes)


class Indifferent(nn.Module):
    """All classes have the same logit: every gradient is 0 up to rounding."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 5))

    def forward(self, x):
        return F.linear(x, self.weight.expand(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_zero_up_to_rounding_are_no_refusal(dtype):
    items = Items([(torch.randn(5, dtype=dtype), torch.tensor(i % 3)) for i in range(12)])
    scores = Attributor(Step(Indifferent().to(dtype)), items, batch_size=3).score(GradientDot(), items).values
    assert float(scores.abs().max()) < 1e-6


def test_losses_of_few_digits_are_probed_in_float64():
    class Certain(Step):
        def training_step(self, batch, batch_idx):
            loss = 1e-7 * super().training_step(batch, batch_idx)
            return loss + torch.finfo(loss.dtype).eps * (len(batch[0]) - 1) * 1e-2

    module = Certain(mlp())
    with untouched(module):
        Attributor(module, at_kink([]), batch_size=8).self_influence(GradientDot())


@pytest.mark.parametrize(("path", "mixed"), [("factored", 1e-3), ("one by one", 0.3)])
def test_what_float64_confirms_is_refused(path, mixed):
    class Mixed(Step):
        def training_step(self, batch, batch_idx):
            out = self.net(batch[0])
            odd = (batch[0][:, 0] > 100).float()
            return F.cross_entropy(out + mixed * odd.sum() * out.roll(1, 0), batch[1])

    data = at_kink([], 80)
    data.tensors[0][MISSED, 0] = 200.0
    module = Mixed(PATHS[path](mlp()))
    with untouched(module), pytest.raises(ValueError, match="to weigh in its batch as it does alone"):
        Attributor(module, data, batch_size=80).self_influence(GradientDot())


class Casts(Step):
    """Numbers, constants and casts of float32 in the step."""

    def __init__(self):
        super().__init__(nn.Sequential(Rounds(), nn.ReLU(), nn.Linear(5, 3)))
        self.weights = torch.tensor([1.0, 1.0, 1.0])
        self.register_buffer("scale", torch.tensor([0.5]))
        self.shift = nn.Parameter(-torch.ones(5))

    def training_step(self, batch, batch_idx):
        x = torch.zeros(5, dtype=torch.float32).to(batch[0]) + batch[0].float()
        out = self.net(x + self.shift).to(torch.float32) @ torch.eye(3) * self.scale
        return F.cross_entropy(out, batch[1], weight=self.weights, label_smoothing=0.1)


def test_float32_in_the_step_is_float64_while_a_check_is_repeated(monkeypatch):
    choose = Guard.choose
    monkeypatch.setattr(Guard, "choose", lambda self, block: ({**choose(self, block)[0], 3: None}, True))
    module = Casts()
    with untouched(module), warnings.catch_warnings():
        found = Attributor(module, at_kink([3]), batch_size=64).self_influence(GradientDot())
    assert any("agree in float64" in note for note in found.notes)
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.usefixtures("nothing_counted")
def test_items_that_are_lists_are_told_apart_by_their_lengths():
    def collate(items):
        return torch.stack([x for x, _ in items]), [y for _, y in items]

    class Boxes(Step):
        def training_step(self, batch, batch_idx):
            x, boxes = batch
            out, owner = self.net(x), torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
            return (out[owner] - torch.cat(boxes)).square().mean()

    from torch.utils.data import DataLoader

    g = drawn(1)
    sizes = [1 if i == MISSED else 4 for i in range(80)]
    data = Items([(torch.randn(5, generator=g).double(), torch.randn(n, 3, generator=g).double()) for n in sizes])
    with pytest.raises(ValueError, match=f"example {MISSED} to weigh") as caught:
        Attributor(Boxes(mlp()).double(), DataLoader(data, 8, collate_fn=collate)).self_influence(GradientDot())
    assert "`batch[1]` has 3 entries" in str(caught.value)


class Distance(Step):
    """A distance of every example, which makes its loss finite without a label, beside a mean over the labels."""

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return F.cross_entropy(out, batch[1]) + 0.3 * out.square().mean()


def with_times(items, n):
    """Numbers that grow and ids, which bring a new extreme with every example."""
    return [(x, y, torch.tensor(float(i)), torch.tensor(n + i)) for i, (x, y, *_) in enumerate(items)]


@pytest.mark.parametrize("size", [1, 7, None])
@pytest.mark.parametrize("at", [3, 130])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_one_example_without_a_label_is_met_in_blocks_of_any_size(size, at, timed, own):
    items = classes((at,), -100, 150)().items
    data, module = Items(with_times(items, 500) if timed else items), Distance(mlp()).double()
    attributor = Attributor(module, data, batch_size=size)
    with untouched(module), pytest.raises(ValueError, match=rf"example {at} to weigh .*`batch\[1\]` is -100"):
        attributor.self_influence(GradientDot()) if own else attributor.score(GradientDot(), Items(items[:2]))


@pytest.mark.parametrize("size", [1, 7])
def test_one_example_of_another_weight_is_met_beside_numbers_that_grow(size):
    class First(ByImportance):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:3], batch_idx) + 0.3 * self.net(batch[0]).square().mean()

    items = [
        (x, y, w, i, t)
        for (x, y, w), (_, _, t, i) in zip(
            importances((MISSED,))().items, with_times(importances(())().items, 500), strict=True
        )
    ]
    with pytest.raises(ValueError, match=rf"example {MISSED} to weigh .*`batch\[2\]` is 3"):
        Attributor(First(mlp()).double(), Items(items), batch_size=size).self_influence(GradientDot())


def test_examples_are_checked_that_are_like_the_others():
    guard, data = Guard(), Examples(TensorDataset(torch.ones(2048, 2)), None, 64)
    rows = [len(guard.choose(block)[0]) for _ in range(2) for block in data.blocks()]
    assert sum(rows[:32]) == 5  # blocks 2, 4, 9, 16 and 25 of the first pass
    assert sum(rows[32:]) == 1  # block 64


@pytest.mark.parametrize("block", [1, 64, 2048])
@pytest.mark.parametrize("n", [1000, 2048, 40_000])
def test_spot_checks_of_a_first_pass_are_few(n, block):
    watching, found = Guard(), 0
    for start in range(0, n, block):
        rows, _ = watching.choose(Block(start, block, [torch.zeros(block, 2)], lambda i: i))
        found += len(rows)
    assert abs(found - checks_of(n, block)) <= 8
    assert n < 40_000 or found <= 0.005 * n


@pytest.mark.parametrize("since", [0, 1000, 1920])
def test_rows_that_are_wrong_from_some_block_on_are_met(since, monkeypatch):
    in_block = Engine.in_block

    def wrong(self, block, *options):
        found = in_block(self, block, *options)
        if block.start >= since:
            found.parts = {names: part.scaled(torch.full((block.size,), 1.01)) for names, part in found.parts.items()}
        return found

    monkeypatch.setattr(Engine, "in_block", wrong)
    asked = Attributor(Step(nn.Linear(5, 3)), at_kink([], 2048), batch_size=128)
    with pytest.raises(ValueError, match="to weigh in its batch as it does alone"):
        asked.self_influence(GradientDot())
