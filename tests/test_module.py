"""What a step may ask and write: its Trainer's stage, a batch of its own class."""

import contextlib

import oracles
import pytest
import pytorch_lightning as pl
import torch
from case import Items, Step, drawn, mlp
from fits import QUIET, fit, seeded
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot, Influence, TracInCP, Trajectory


class Asking(pl.LightningModule):
    """Has a loss only while its Trainer trains."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1]) if self.trainer.training else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Bag:
    """A batch that moves itself between devices, in place."""

    def __init__(self, items):
        self.x, self.y = torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    def to(self, *args, **kwargs):
        self.x, self.y = self.x.to(*args, **kwargs), self.y.to(*args, **kwargs)
        return self


class Writing(pl.LightningModule):
    """Leaves its features in the batch, or changes what is there."""

    def __init__(self, inside):
        super().__init__()
        self.layer, self.inside = torch.nn.Linear(4, 4), inside

    def training_step(self, batch):
        if self.inside:
            batch.x *= 2
            return F.cross_entropy(self.layer(batch.x), batch.y)
        batch.x = self.layer(batch.x)
        return F.cross_entropy(batch.x, batch.y)


class Precise(pl.LightningModule):
    """Notes under which precision its products are made."""

    def __init__(self, seen):
        super().__init__()
        self.layer, self.note = torch.nn.Linear(4, 3), lambda: seen.add(precision())

    def training_step(self, batch):
        self.note()
        return F.cross_entropy(self.layer(batch[0]), batch[1])


def precision():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@contextlib.contextmanager
def coarse():
    """TF32 and bfloat16 products wherever the hardware has them, as many scripts ask for."""
    before = precision()
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def data(n=9):
    g = drawn(1)
    return Items(list(zip(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g), strict=True)))


def test_a_step_finds_its_trainer_training_and_the_trainer_as_it_was():
    module = seeded(Asking)
    trainer = fit(module, DataLoader(data(), 3))
    stage = trainer.state.stage
    scores = Attributor(module, DataLoader(data(), 3)).score(GradientDot(), data())
    assert trainer.state.stage is stage
    trainer.training = True
    ones = [next(iter(DataLoader([pair]))) for pair in data().items]
    expected = oracles.inner(*[oracles.rows(module, ones, ["layer.weight", "layer.bias"])] * 2)
    oracles.assert_scores(scores.values, expected, 1e-5)


def test_without_a_trainer_a_step_finds_one_that_trains():
    Attributor(seeded(Asking), DataLoader(data(), 3)).score(GradientDot(), data())


def test_what_a_step_writes_into_a_batch_of_its_own_class_is_gone_at_the_next_pass():
    for inside in (False, True):
        module = seeded(Writing, inside)
        attributor = Attributor(module, DataLoader(data(), 3, collate_fn=Bag), trainer=pl.Trainer(**QUIET))
        names = ["layer.weight", "layer.bias"]
        expected = oracles.inner(*[oracles.rows(module, [Bag([pair]) for pair in data().items], names)] * 2)
        for _ in range(2):
            oracles.assert_scores(attributor.score(GradientDot(), data()).values, expected, 1e-5)


class Annealed(Step):
    """Its loss grows with every step and every epoch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.global_step + 10 * self.trainer.current_epoch)


class Doubles(Step):
    """Its inputs are doubled while its Trainer trains."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * (2 if self.trainer.training else 1), batch[1]]


def test_a_loss_that_follows_the_step_is_that_of_each_checkpoint(tmp_path):
    module = seeded(Annealed, mlp(4))
    trainer = fit(module, DataLoader(data(), 3), Influence(dirpath=tmp_path))
    clock = trainer.global_step, trainer.current_epoch
    trajectory, ones = Trajectory.load(tmp_path), [next(iter(DataLoader([pair]))) for pair in data().items]
    expected, plain = 0.0, seeded(Step, mlp(4))
    for checkpoint, factor in zip(trajectory.checkpoints[1:], (1 + 3 + 0, 1 + 6 + 10), strict=True):
        state = checkpoint.load().parameters
        rate = 0.05 * 0.5**checkpoint.epoch
        found = oracles.rows(plain, ones, sorted(state), state=state)
        expected = expected + oracles.inner(found, found) * factor**2 * rate / 3
    for asked in (module, Annealed(mlp(4))):  # with the Trainer of its fit, and with none
        scores = Attributor(asked, data(), trajectory).score(TracInCP(), data())
        oracles.assert_scores(scores.values, expected, 1e-5)
    assert (trainer.global_step, trainer.current_epoch) == clock


def test_a_hook_on_the_batch_finds_its_trainer_training_at_the_end_of_a_fit_and_without_one(tmp_path):
    influence = Influence([TracInCP()], queries=data(), dirpath=tmp_path, max_cost=1e9, log_scores=False)
    fit(seeded(Doubles, mlp(4)), DataLoader(data(), 3), influence)
    doubled = Items([(2 * x, y) for x, y in data().items])
    offline = Attributor(Doubles(mlp(4)), data(), influence.trajectory)
    plain = Attributor(Step(mlp(4)), doubled, influence.trajectory).score(TracInCP(), doubled)
    for scores in (influence.scores["TracInCP"], offline.score(TracInCP(), data())):
        oracles.assert_scores(scores.values, plain.values, 1e-5)


def test_a_table_that_look_ups_shorten_is_left_alone():
    module = seeded(Step, torch.nn.Sequential(torch.nn.Embedding(5, 4, max_norm=0.1), torch.nn.Linear(4, 3)))
    before = module.net[0].weight.detach().clone()
    pairs = Items([(torch.tensor(i), torch.tensor(i % 3)) for i in range(5)])
    Attributor(module, DataLoader(pairs, 3)).score(GradientDot(), pairs)
    torch.testing.assert_close(module.net[0].weight, before, rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "dtype"), [("16-true", torch.float16), ("bf16-true", torch.bfloat16)])
def test_weights_of_16_bits_are_scored_in_float32_and_come_back(precision, dtype, tmp_path):
    module = seeded(Step, mlp(4))
    trainer = fit(module, DataLoader(data(), 3), Influence(dirpath=tmp_path), precision=precision)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trajectory, plain = Trajectory.load(tmp_path), Step(mlp(4)).double()
    ones = [next(iter(DataLoader([(x.double(), y)]))) for x, y in data().items]
    expected = 0.0
    for checkpoint in trajectory.checkpoints[1:]:
        found = oracles.rows(plain, ones, sorted(before), state=checkpoint.load().parameters)
        expected = expected + oracles.inner(found, found) * 0.05 * 0.5**checkpoint.epoch / 3
    for given in (trainer, None):
        scores = Attributor(module, data(), trajectory, given).score(TracInCP(), data())
        oracles.assert_scores(scores.values, expected, 1e-5)
        assert "Weights of 16 bits were scored in float32." in scores.notes
    after = {name: p.detach() for name, p in module.named_parameters()}
    assert {p.dtype for p in after.values()} == {dtype}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


class OwnGenerator(Items):
    """Noise that nobody can seed from outside."""

    def __init__(self, items):
        super().__init__(items)
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, i):
        x, y = self.items[i]
        return x + 1e-4 * torch.randn(x.shape, generator=self.generator), y


def test_data_that_differ_at_every_reading_are_refused():
    noisy = OwnGenerator(data().items)
    for train, queries in ((noisy, data()), (data(), noisy)):
        with pytest.raises(ValueError, match=r"Expected OwnGenerator to give the same example under the same random"):
            Attributor(seeded(Step, mlp(4)), train).score(GradientDot(), queries)


def test_tf32_is_as_the_user_has_set_it_but_in_checks_and_comes_back():
    full, chosen = ("highest", False), ("medium", True)
    for word, expected in ((None, {full, chosen}), ("bf16-mixed", {full, chosen}), ("32-true", {full})):
        seen = set()
        with coarse():
            Attributor(seeded(Precise, seen), DataLoader(data(), 3), precision=word).score(GradientDot(), data())
            assert precision() == chosen
            broken = Items([(x * torch.nan, y) for x, y in data().items])
            with pytest.raises(ValueError, match="Expected finite losses"):
                Attributor(seeded(Precise, seen), DataLoader(broken, 3), precision=word).score(GradientDot(), broken)
            assert precision() == chosen
        assert seen == expected


@pytest.mark.gpu
def test_on_a_gpu_that_trains_in_tf32_scores_are_those_of_full_precision():
    net = torch.nn.Sequential(torch.nn.Linear(4, 256), torch.nn.Tanh(), torch.nn.Linear(256, 3))
    module = seeded(Step, net)
    ones = [next(iter(DataLoader([pair]))) for pair in data().items]
    names = [name for name, _ in module.named_parameters()]
    expected = oracles.inner(*[oracles.rows(module, ones, names)] * 2)
    trainer = pl.Trainer(**{**QUIET, "accelerator": "gpu"})
    with coarse():
        ask = lambda word: Attributor(module, DataLoader(data(), 3), trainer=trainer, precision=word)  # noqa: E731
        scores, coarsely = (ask(word).score(GradientDot(), data()) for word in ("32-true", None))
    oracles.assert_scores(scores.values, expected, 1e-5)
    oracles.assert_scores(coarsely.values, expected, 1e-2)
    assert any("TF32" in note for note in coarsely.notes)
    assert not any("TF32" in note for note in scores.notes)
    assert next(module.parameters()).device.type == "cpu"
