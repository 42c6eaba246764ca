"""What `Influence` takes and refuses, in both packages of Lightning."""

import re
import subprocess
import sys

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from fits import Indexed, Net, fit, loader, recorded, seeded
from pytorch_lightning.loggers import CSVLogger

from lightning_influence.callback.influence import Influence
from lightning_influence.methods.method import Evidence, Method
from lightning_influence.types import MissingEvidence


class SomeMethod(Method):
    needs = Evidence(0)

    def score(self, setting, queries):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"methods": [SomeMethod(), SomeMethod()]}, ValueError, "two of 'SomeMethod'. Name them in a dict"),
        ({"methods": "TracInCP"}, TypeError, "list or a dict of methods, got 'TracInCP'"),
        ({"methods": [SomeMethod]}, TypeError, "Make one: `SomeMethod()`"),
        ({"methods": {"a": 3}}, TypeError, "methods such as `TracInCP()`, got 3 as 'a'"),
        ({"queries": "validation"}, ValueError, "got 'validation'"),
        ({"queries": "val:x"}, ValueError, "got 'val:x'"),
        ({"queries": 3}, TypeError, "got 3"),
        ({"every_n_epochs": -1}, ValueError, "`every_n_epochs` to be an integer of at least 0 or None, got -1"),
        (
            {"every_n_train_steps": 1.5},
            ValueError,
            "`every_n_train_steps` to be an integer of at least 0 or None, got 1.5",
        ),
        ({"every_n_epochs": 2, "every_n_train_steps": 5}, ValueError, "got both (2, 5)"),
        ({"top_k": 0}, ValueError, "`top_k` to be a positive integer or None, got 0"),
        ({"self_influence": "yes"}, TypeError, "`self_influence` to be True or False, got 'yes'"),
        ({"parameters": []}, ValueError, "got []"),
        ({"loss": "mse"}, TypeError, "`loss` to be a function or None, got 'mse'"),
        ({"sample_id": 3}, TypeError, "`sample_id` to be a function or None, got 3"),
        ({"max_cost": 0}, ValueError, "`max_cost` to be a positive number, got 0"),
        ({"log_scores": 1}, TypeError, "`log_scores` to be True or False, got 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_refused(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        Influence(**arguments)


def test_good_arguments_are_kept():
    method = SomeMethod()
    assert Influence([method]).methods == {"SomeMethod": method}
    assert Influence({"mine": method}).methods == {"mine": method}
    assert Influence(queries="val:1").queries == "val:1"
    assert Influence(parameters="head.*").parameters == ["head.*"]
    assert Influence(every_n_train_steps=5).state_key != Influence().state_key


def test_nothing_is_read_before_a_fit():
    influence = Influence()
    with pytest.raises(MissingEvidence, match="Expected a fit with this callback, got none"):
        _ = influence.trajectory
    with pytest.raises(MissingEvidence, match="Expected a fit with this callback, got none"):
        _ = influence.attributor
    assert influence.scores == {}


class UnifiedNet(lightning.pytorch.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(4, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["idx"].tolist())
        return (self.layer(batch["x"]) - batch["y"]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch], ids=lambda package: package.__name__)
def test_both_packages_take_the_callback(package, tmp_path):
    influence = Influence(dirpath=tmp_path)
    assert isinstance(influence, package.Callback)
    module = seeded(Net if package is pytorch_lightning else UnifiedNet)
    fit(module, loader(), influence, package=package)
    assert recorded(influence.trajectory) == module.seen
    bad = Influence(dirpath="s3://bucket/runs")
    with pytest.raises(package.utilities.exceptions.MisconfigurationException, match="Pass a local `dirpath=`"):
        fit(module, loader(), bad, package=package)


def test_the_default_folder_is_beside_the_loggers_run(tmp_path):
    influence = Influence()
    fit(seeded(Net), loader(), influence, logger=CSVLogger(tmp_path, name="mine", version=3))
    assert influence.run_dir == tmp_path / "mine" / "version_3" / "influence" / "run-0"
    fit(seeded(Net), loader(), influence, default_root_dir=tmp_path)
    assert influence.run_dir == tmp_path / "influence" / "run-0"


def test_scores_are_cleared_by_the_next_fit(tmp_path):
    influence = Influence(dirpath=tmp_path)
    influence.scores["Old"] = 1
    fit(seeded(Net), loader(Indexed(8)), influence, max_epochs=1)
    assert "Old" not in influence.scores


def test_no_attribute_is_called_log(tmp_path):
    influence = Influence(dirpath=tmp_path)
    assert not {"log", "log_dict"} & set(dir(type(influence)))


def test_a_validation_run_records_nothing(tmp_path):
    class Validates(Net):
        def validation_step(self, batch, batch_idx):
            self.loss(batch)

    influence = Influence(dirpath=tmp_path / "influence")
    trainer = pytorch_lightning.Trainer(logger=False, callbacks=[influence], enable_progress_bar=False)
    trainer.validate(seeded(Validates), loader(shuffle=False), verbose=False)
    assert not (tmp_path / "influence").exists()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["pytorch_lightning", "lightning.pytorch"])
def test_the_users_own_package_keeps_its_voice(first):
    said = "from lightning_utilities.core import rank_zero; print(rank_zero.log.name)"
    program = f"import {first}, lightning_influence; {said}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(first.partition(".")[0])
