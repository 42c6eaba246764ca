"""The verdict of the checks that a run keeps: who may use it, and what is checked anew."""

import os
import subprocess
import sys
import types

import pytest
import torch
from fits import fit
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributor, GradientDot, Influence, Trajectory
from lightning_influence.attribution.asking_again import asking_again
from lightning_influence.files import checked_json
from lightning_influence.gradients import Plan, Reduction
from lightning_influence.gradients.spot_checks import UnequalWeight
from lightning_influence.module import code_digest
from lightning_influence.module.code_libraries import Unclear
from lightning_influence.module.task import Task
from lightning_influence.processes import Processes
from lightning_influence.setting import kept_checks

SOURCE = """
import math
import time
import torch
import pytorch_lightning as pl
from torch.nn import functional as F

SHARPNESS = 1.0

def scaled(x):
    return x * SHARPNESS

class Holder:
    def __init__(self):
        self.factor = 1.0
        self.other = object()

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        self.holder, self.named, self.unused = Holder(), {"a": 1.0}, iter(())

    def logits(self, x):
        return scaled(self.net(x)) * self.holder.factor * self.named["a"]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.logits(x), y)

    def predict_step(self, batch, batch_idx):
        return time.time()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.trainer.max_epochs * 0.05)
"""


TWO = 4  # passes: two examples alone, both together, and a look at the operations of the loss


LIBRARIES = """
import torch
import torchmetrics
import pytorch_lightning as pl
from torch.nn import functional as F

class Layer(torch.nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return super()._ff_block(x) + 1.0

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"beta": 1.0})
        self.layer = Layer(4, 1, 8, batch_first=True)
        self.accuracy = torchmetrics.classification.BinaryAccuracy(threshold=0.5)

    def training_step(self, batch, batch_idx):
        return F.softplus(self.layer(batch)).mean() * self.hparams.beta * getattr(self, "accuracy").threshold
"""


def made(*changes, text=SOURCE):
    """A module of the source with some of its text replaced, as a file that was edited has it."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    code = types.ModuleType("users_code")
    exec(text, vars(code))
    torch.manual_seed(0)
    return code.Net()


def data():
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(12, 3, generator=draw), torch.arange(12) % 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("fit")
    fit(made(), DataLoader(data(), 4), Influence(dirpath=found))
    return found


@pytest.fixture
def asked(folder, monkeypatch):
    """Asks in place of a new process; returns the examples run before scoring, those that compare data aside."""
    run = Task._run

    def ask(module=None, train=None, check_data=False, **options):
        ran = []
        with monkeypatch.context() as counted:
            counted.setattr(Task, "_run", lambda task, batch: (ran.append(batch[1].shape[0]), run(task, batch))[1])
            trajectory = Trajectory.load(folder)
            attributor = Attributor(module or made(), train or data(), trajectory, check_data=check_data, **options)
            with attributor.session() as setting:
                ask.plan = setting.engine.plan
        ask.attributor = attributor
        return ran

    for file in files(folder) if (folder / "run-0" / "checks").exists() else ():
        file.unlink()
    assert len(ask()) > 8
    ask.first = ask.plan
    return ask


def files(folder):
    return sorted((folder / "run-0" / "checks").iterdir())


def test_two_examples_are_checked_where_nothing_has_changed(asked, folder):
    assert len(asked()) == TWO
    assert asked.plan == asked.first
    assert (
        list(asked.plan.layouts)
        == list(asked.first.layouts)
        == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    )
    assert len(asked(batch_size=5)) == TWO
    found, trajectory = asked.attributor.score(GradientDot(), data()).values, Trajectory.load(folder)
    (file,) = files(folder)
    content = file.read_bytes()
    file.unlink()
    assert torch.equal(Attributor(made(), data(), trajectory, batch_size=5).score(GradientDot(), data()).values, found)
    assert file.read_bytes() == content


CHANGED = {
    "step": [
        ("return F.cross_entropy(self.logits(x), y)", "return F.cross_entropy(self.logits(x), y, label_smoothing=0.1)")
    ],
    "branch": [("return F.cross", "if y.sum() < 0:\n            x = x * 2\n        return F.cross")],
    "helper": [("return x * SHARPNESS", "return SHARPNESS * x")],
    "global": [("SHARPNESS = 1.0", "SHARPNESS = 2.0")],
    "attribute": [('{"a": 1.0}', '{"a": 2.0}')],
    "object": [("self.factor = 1.0", "self.factor = 1.5")],
    "layer": [("torch.nn.Tanh()", "torch.nn.Tanhshrink()")],
    "frozen": [("self.holder, self.named", "self.net[0].bias.requires_grad_(False)\n        self.holder, self.named")],
    "hook": [
        (
            "self.holder, self.named",
            "self.net[1].register_forward_hook(lambda m, a, y: y)\n        self.holder, self.named",
        )
    ],
}


@pytest.mark.parametrize("what", CHANGED)
def test_changed_code_is_checked_anew(what, asked, folder):
    before = files(folder)
    assert len(asked(made(*CHANGED[what]))) > 8
    assert len(files(folder)) == len(before) + 1
    assert len(asked(made(*CHANGED[what]))) < 6


def test_what_no_loss_reads_may_change(asked):
    changes = ("return time.time()", "return 1"), ("iter(())", "3")
    assert len(asked(made(*changes, ("lr=self.trainer.max_epochs * 0.05", "lr=0.2")))) == TWO


def test_what_libraries_call_and_read_is_seen(monkeypatch):
    changes = (
        ("+ 1.0", "+ 2.0"),
        ('"beta": 1.0', '"beta": 2.0'),
        ("=0.5", "=0.6"),
        ("1, 8", "2, 8"),
        ("softplus", "mish"),
    )
    modules = [made(text=LIBRARIES), *(made(change, text=LIBRARIES) for change in changes)]
    assert len({code_digest.digest(module) for module in modules}) == len(modules)
    assert code_digest.digest(made(text=LIBRARIES)) == code_digest.digest(modules[0])
    before = code_digest.digest(modules[0])
    monkeypatch.setattr(torch.nn.functional, "softplus", lambda x: x)
    assert code_digest.digest(modules[0]) != before


def one_label(train):
    train.tensors[1][5] = 1 - train.tensors[1][5]
    return train


def test_other_data_and_settings_are_checked_anew(asked, monkeypatch):
    assert len(asked(train=one_label(data()))) > 8
    assert len(asked(parameters=["net.0.*"])) > 8
    assert len(asked(loss=lambda module, batch: module.logits(batch[0]).square().sum(1))) > 8
    monkeypatch.setattr(kept_checks, "_stamp", lambda: ["0.0.0", ""])
    assert len(asked()) > 8
    monkeypatch.undo()
    assert len(asked()) == TWO


@pytest.mark.parametrize(
    "reads",
    ["self.trainer.current_epoch", "time.time()", "eval('1')", "open", "self.unused", "locals()"],
)
def test_a_step_that_reads_what_cannot_be_seen_keeps_nothing(reads, asked, folder):
    module = made(("x, y = batch", f"x, y = batch\n        {reads}"))
    before = files(folder)
    with pytest.raises(Unclear):
        code_digest.digest(module)
    assert len(asked(module)) > 8
    assert len(asked(module)) > 8
    assert files(folder) == before


def test_a_damaged_file_is_ignored(asked, folder):
    (file,) = files(folder)
    content = file.read_bytes()
    for damaged in (b"", content[:-9], content.replace(b"FIRST", b"MINOR")):
        file.write_bytes(damaged)
        assert len(asked()) > 8
        assert file.read_bytes() == content


@pytest.mark.parametrize(
    "wrong", [{"layouts": []}, {"uses": []}, {"separate": 3}, {"key": "0"}, {"reduction": "sum"}, {"copy_leaves": True}]
)
def test_a_wrong_verdict_is_noticed(wrong, asked, folder):
    (file,) = files(folder)
    file.write_bytes(checked_json.encode(checked_json.decode(file.read_bytes()) | wrong))
    assert len(asked()) > 8


def test_a_folder_that_cannot_be_written_to(asked, folder, monkeypatch):
    def full(*args, **options):
        raise OSError("read-only")

    monkeypatch.setattr(kept_checks, "write_atomically", full)
    before = files(folder)
    assert len(asked(made(("SHARPNESS = 1.0", "SHARPNESS = 3.0")))) > 8
    assert files(folder) == before


@pytest.mark.slow
def test_a_verdict_on_examples_that_showed_too_little_misleads_no_later_process(tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    train = TensorDataset(torch.randn(80, 4, 3, generator=draw), torch.randint(2, (80, 4), generator=draw))
    train.tensors[1][42, 1:] = -100  # none of the examples that are looked at has fewer labels
    change = "self.logits(x), y", "self.logits(x).flatten(0, 1), y.flatten()"
    fit(made(change), DataLoader(train, 8), Influence(dirpath=tmp_path), max_epochs=1)
    found, kept = [], []
    monkeypatch.setattr(
        kept_checks.KeptChecks,
        "read",
        lambda self, read=kept_checks.KeptChecks.read: kept.append(read(self)) or kept[-1],
    )
    for _ in range(2):
        attributor = Attributor(made(change), train, Trajectory.load(tmp_path), batch_size=20)
        found.append(attributor.score(GradientDot(), train))
        assert any("mean over its tokens" in note for note in found[-1].notes)
    assert [verdict is None for verdict in kept] == [True, False]
    assert torch.equal(found[0].values, found[1].values)


PROGRAM = """
import sys, logging, torch
sys.path.insert(0, {folder!r})
from users_code import Net
from torch.utils.data import TensorDataset
from lightning_influence import Attributor, Trajectory
from lightning_influence.module.task import Task
run, ran = Task._run, []
Task._run = lambda task, batch: (ran.append(batch[1].shape[0]), run(task, batch))[1]
draw = torch.Generator().manual_seed(0)
data = TensorDataset(torch.randn(12, 3, generator=draw), torch.arange(12) % 2)
with Attributor(Net(), data, Trajectory.load({fit!r}), check_data=False).session():
    print("ran", len(ran))
"""


@pytest.mark.slow
def test_another_process_checks_two_examples_until_the_code_changes(folder, tmp_path):
    source, found = tmp_path / "users_code.py", []
    for old, new in (("", ""), ("", ""), ("return x * SHARPNESS", "return SHARPNESS * x + 0")):
        source.write_text(SOURCE.replace(old, new) if old else SOURCE)
        program = PROGRAM.format(folder=str(tmp_path), fit=str(folder))
        out = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, check=True).stdout
        found.append(int(out.split()[-1]))
    assert found[1] == TWO
    assert found[2] > 8


def test_processes_ask_again_where_one_of_them_had_checked_less():
    class Two(Processes):
        def gathered(self, value):
            return [value, True]

    class Asks:
        processes = Two()
        _session = types.SimpleNamespace(knows_more_after=lambda error: False)
        asked = 0

        @asking_again
        def ask(self):
            self.asked += 1
            if self.asked == 1:
                raise UnequalWeight("one example weighs more")
            return self.asked

    assert Asks().ask() == 2


def test_a_run_keeps_the_latest_verdicts(tmp_path):
    path = tmp_path / "checks"
    for count in range(40):
        kept_checks.KeptChecks(path / f"{count}.json", str(count), ["a"]).keep(Reduction.MEAN, Plan({}), None)
        os.utime(path / f"{count}.json", (count, count))
    assert {int(file.stem) for file in path.iterdir()} == set(range(8, 40))
