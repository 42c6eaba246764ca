"""Numbers that hooks change during a fit, such as the growing weight of a loss: each checkpoint has its own."""

import numpy as np
import oracles
import pytest
import pytorch_lightning as pl
import torch
from case import Step, both, mlp
from fits import QUIET
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import Attributor, GradientDot, Influence, TracInCP, Trajectory
from lightning_influence.files.checked_json import encode
from lightning_influence.module.numbers import NumberRecord, numbers_of, put_back
from lightning_influence.trajectory.files import MANIFEST, read_manifest

BATCH = 4


class Growing(Step):
    """Each epoch has its own weight of a second loss, which its end spoils."""

    def __init__(self):
        super().__init__(mlp())
        self.beta, self.calls, self.kept = 0.0, 0, 3

    def on_train_epoch_start(self):
        self.beta = 0.5 * (1 + self.current_epoch)

    def on_train_epoch_end(self):
        self.beta = 100.0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        out = self(batch[0])
        return F.cross_entropy(out, batch[1]) + self.beta * out.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fresh():
    torch.manual_seed(0)
    return Growing().double()


def fitted(folder, epochs=2, **options):
    data = both(5, n=8)
    module, influence = fresh(), Influence(dirpath=folder)
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, callbacks=[influence])
    trainer.fit(module, DataLoader(data["train"](), BATCH), **options)
    return module, influence, trainer, data


def brute_force(module, trajectory, data, epochs):
    """One backward pass per example with the weight of its epoch."""
    ones = {key: [[t[None] for t in item] for item in data[key]()] for key in ("train", "queries")}
    names = [name for name, _ in module.named_parameters()]
    share = torch.full((1, 8), 0.05 / BATCH, dtype=torch.float64)
    total = 0.0
    for epoch, checkpoint in enumerate(list(trajectory.checkpoints)[1 : epochs + 1]):
        module.beta = 0.5 * (1 + epoch)
        state = checkpoint.load()
        about = module, ones["train"], ones["queries"], names
        total = total + oracles.tracin(*about, [({**state.parameters, **state.buffers}, share)])
    return total


def test_scores_use_the_numbers_of_each_checkpoint_now_and_later(tmp_path):
    module, influence, _, data = fitted(tmp_path)
    expected = brute_force(fresh(), influence.trajectory, data, epochs=2)
    now = influence.attributor.score(TracInCP(), data["queries"]())
    assert (module.beta, module.kept) == (100.0, 3)  # as the fit left them
    oracles.assert_scores(now.values, expected, 1e-10)
    later = Attributor(fresh(), DataLoader(data["train"](), BATCH), Trajectory.load(tmp_path))
    oracles.assert_scores(later.score(TracInCP(), data["queries"]()).values, expected, 1e-10)
    assert later.module.beta == 0.0


def test_only_what_changed_is_in_the_run(tmp_path):
    _, influence, _, _ = fitted(tmp_path)
    assert set(influence.trajectory.numbers) == {"beta", "calls"}
    assert [value for _, value in influence.trajectory.numbers["beta"]] == [0.5, 1.0]


def test_a_resumed_run_has_the_numbers_of_both_parts(tmp_path):
    _, _, trainer, data = fitted(tmp_path)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    _, influence, _, _ = fitted(tmp_path, epochs=3, ckpt_path=tmp_path / "after.ckpt", weights_only=False)
    assert len(influence.trajectory.checkpoints) == 4
    assert influence.trajectory.notes == ()
    assert [value for _, value in influence.trajectory.numbers["beta"]] == [0.5, 1.0, 1.5]
    assert [value for _, value in influence.trajectory.numbers["kept"]] == [3]
    expected = brute_force(fresh(), influence.trajectory, data, epochs=3)
    oracles.assert_scores(influence.attributor.score(TracInCP(), data["queries"]()).values, expected, 1e-10)


def test_runs_without_numbers_are_read(tmp_path):
    _, influence, _, data = fitted(tmp_path)
    content = read_manifest(influence.run_dir)
    del content["numbers"], content["data"]
    (influence.run_dir / MANIFEST).write_bytes(encode(content))
    trajectory = Trajectory.load(tmp_path)
    assert trajectory.numbers == {}
    scores = Attributor(fresh(), data["train"](), trajectory).score(GradientDot(), data["queries"]())
    assert scores.values.isfinite().all()


def test_numbers_are_put_back_by_step():
    module = fresh()
    record = NumberRecord(module, resumed=False)
    for step, beta in ((2, 0.5), (4, 0.5), (6, float("nan")), (8, float("nan")), (10, 2.0)):
        module.beta = beta
        record.note(step)
        module.beta = 100.0
        record.note(step)  # of a step that has been noted
    assert set(record.changed) == {"beta"}
    assert [step for step, _ in record.changed["beta"]] == [2, 6, 10]
    for step, expected in ((0, 0.5), (2, 0.5), (5, 0.5), (10, 2.0), (11, 2.0)):
        put_back(module, record.changed, step)
        assert module.beta == expected
    module.beta = len
    put_back(module, {**record.changed, "net.gone": [(1, 1)], "elsewhere.n": [(1, 1)]}, 2)
    assert module.beta is len
    assert "net.gone" not in numbers_of(module)


class Schedule:
    def __init__(self):
        self.value = 0.0


class Holding(Growing):
    """The weight of the second loss, kept where `place` says."""

    def __init__(self, place):
        super(Growing, self).__init__(mlp())
        self.calls = 0
        self.place, self.step_weights, self.inside = place, {}, {"loss": {"kl": 0.0}}
        self.listed, self.paired, self.tensor = [0.0], (0.0, 1.0), torch.zeros(1, dtype=torch.float64)
        self.array, self.scalar, self.schedule, self._private = np.zeros(1), np.float64(0), Schedule(), 0.0
        self.stage = None
        self.save_hyperparameters({"beta": 0.0})

    def on_train_epoch_start(self):
        self.set(0.5 * (1 + self.current_epoch))

    def on_train_epoch_end(self):
        self.set(100.0)

    def set(self, beta):
        self.step_weights["kl"] = self.inside["loss"]["kl"] = self.hparams.beta = beta
        self.hparams["beta"], self.listed[0], self.paired = beta, beta, (beta, 1.0)
        self.tensor, self.array[0], self.scalar = torch.tensor([beta]).double(), beta, np.float64(beta)
        self.schedule.value = self._private = beta
        self.stage = f"{beta}"

    @property
    def beta(self):
        return {
            "hparams": lambda: self.hparams.beta,
            "a dict": lambda: self.step_weights["kl"],
            "a dict in a dict": lambda: self.inside["loss"]["kl"],
            "a list": lambda: self.listed[0],
            "a tuple": lambda: self.paired[0],
            "a tensor": lambda: self.tensor,
            "an array": lambda: torch.from_numpy(self.array.copy()),
            "a number of NumPy": lambda: float(self.scalar),
            "an object": lambda: self.schedule.value,
            "a private attribute": lambda: self._private,
            "a word": lambda: float(self.stage),
        }[self.place]()

    @beta.setter
    def beta(self, value):
        self.set(value)


PLACES = ["hparams", "a dict", "a dict in a dict", "a list", "a tuple", "a tensor", "an array", "a number of NumPy"]


@pytest.mark.parametrize("place", [*PLACES, "an object", "a private attribute", "a word"])
def test_values_that_are_kept_elsewhere_are_given_back_too(place, tmp_path):
    def fresh():
        torch.manual_seed(0)
        return Holding(place).double()

    data, module, influence = both(5, n=8), fresh(), Influence(dirpath=tmp_path)
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[influence])
    trainer.fit(module, DataLoader(data["train"](), BATCH))
    expected = brute_force(fresh(), influence.trajectory, data, epochs=2)
    now = influence.attributor.score(TracInCP(), data["queries"]())
    assert float(module.beta) == 100.0
    oracles.assert_scores(now.values, expected, 1e-10)
    later = Attributor(fresh(), DataLoader(data["train"](), BATCH), Trajectory.load(tmp_path))
    oracles.assert_scores(later.score(TracInCP(), data["queries"]()).values, expected, 1e-10)
    assert later.module.step_weights == {}
    assert later.module.hparams == {"beta": 0.0}


def test_what_becomes_large_is_not_recorded():
    module = fresh()
    module.listed, module.growing = [0], []
    record = NumberRecord(module, resumed=False)
    for step in (1, 2):
        module.listed, module.growing = [step], [0.0] * (60 * step)
        record.note(step)
    assert set(record.changed) == {"listed"}
