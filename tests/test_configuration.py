"""The callback and its methods by YAML, through the LightningCLI of both packages."""

import importlib
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.slow
pytest.importorskip("jsonargparse")

from lightning_influence import GradientDot, Influence, TracInCP

PACKAGES = [name for name in ("pytorch_lightning", "lightning.pytorch") if importlib.util.find_spec(name.split(".")[0])]

CONFIG = """
seed_everything: false
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_influence.Influence
      init_args:
        queries: val
        dirpath: {folder}
        top_k: 2
        parameters: ["*weight"]
        methods: {methods}
"""
AS_LIST = (
    "[{class_path: lightning_influence.TracInCP, init_args: {checkpoints: [-1]}}, lightning_influence.GradientDot]"
)
AS_DICT = "{likeness: {class_path: lightning_influence.TracInCP, init_args: {normalize: cosine}}}"


def cli(package, arguments):
    pl = importlib.import_module(package)

    class Net(pl.LightningModule):
        def __init__(self, width: int = 3):
            super().__init__()
            self.layer = torch.nn.Linear(width, 2)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(8, 3), torch.arange(8) % 2), 4)

        def val_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(5, 3), torch.arange(5) % 2), 5)

    made = importlib.import_module(f"{package}.cli").LightningCLI
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program.py", *arguments])
        return made(Net, Data, save_config_callback=None)


def config(tmp_path, methods):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(folder=tmp_path / "influence", methods=methods))
    return str(path)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (AS_LIST, {"TracInCP": TracInCP(checkpoints=(-1,)), "GradientDot": GradientDot()}),
        (AS_DICT, {"likeness": TracInCP(normalize="cosine")}),
    ],
    ids=["list", "dict"],
)
def test_a_fit_by_yaml_scores_the_validation_loader(package, methods, expected, tmp_path):
    ran = cli(package, ["fit", "--config", config(tmp_path, methods)])
    (influence,) = [one for one in ran.trainer.callbacks if isinstance(one, Influence)]
    assert influence.methods == expected
    assert (influence.queries, influence.top_k, influence.parameters) == ("val", 2, ["*weight"])
    assert set(influence.scores) == set(expected)
    assert all((len(scores), scores.top_k) == (5, 2) for scores in influence.scores.values())
    assert (tmp_path / "influence" / "run-0" / "scores").is_dir()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_setting_that_a_method_has_not_is_refused_before_the_fit(package, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli(package, ["fit", "--config", config(tmp_path, AS_DICT.replace("normalize", "normalise"))])
    assert ended.value.code == 2
    assert "normalise" in capsys.readouterr().err


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        (
            ["--trainer.callbacks.help", "lightning_influence.Influence"],
            ["Record what a fit does with each training example", "Keep only the k strongest", "TracInCP"],
        ),
        (
            ["--trainer.callbacks", "lightning_influence.Influence"]
            + ["--trainer.callbacks.methods.help", "lightning_influence.TracInCP"],
            ["positions in the trajectory (negative ones count from the end)"],
        ),
    ],
    ids=["callback", "method"],
)
def test_help_comes_from_the_docstrings(package, asked, parts, capsys):
    with pytest.raises(SystemExit) as ended:
        cli(package, ["fit", *asked])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(part in out for part in parts), out
