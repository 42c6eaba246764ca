"""Every Python block of the README runs as it is written, one after the other, and does what the text says."""

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_influence

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
N_TRAIN = 30


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def noisy_blobs(n, centres):
    labels = torch.arange(n) % 3
    return TensorDataset(centres[labels] + 0.3 * torch.randn(n, 4), labels)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What a reader of the README has: a LightningModule and data, in a folder of their own; here small and quiet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl, "Trainer", lambda trainer=pl.Trainer, **given: trainer(**QUIET | given))
    torch.manual_seed(0)
    centres = torch.randn(3, 4)
    train, val, test = (noisy_blobs(n, centres) for n in (N_TRAIN, 6, 5))
    return {
        **{"Classifier": Classifier, "model": Classifier(), "class_names": ["a", "b", "c"]},
        **{"train_dataset": train, "val_dataset": val, "test_dataset": test},
        "train_dataloader": DataLoader(train, batch_size=10, shuffle=True),
    }


def test_every_python_block_runs_in_order(run, capsys):
    Path("decisions.csv").write_text("train_id,train_base_id,decision\n7,7,wrong label\n3,3,fine\n12,12,wrong label\n")
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), run)

    assert run["scores"].values.shape == (6, N_TRAIN)
    assert Path("influence.html").stat().st_size > 10_000
    assert run["wrong"] == {7, 12}
    assert list(run["kept"].indices) == [i for i in range(N_TRAIN) if i not in (7, 12)]
    assert run["hydra"].values.shape == (5, N_TRAIN)
    assert run["evaluate"](run["hydra"], run["bank"]).metrics["lds"] > 0.9
    assert "noise ceiling of rank correlations: 1.00" in capsys.readouterr().out


def test_there_are_blocks_to_run():
    assert len(BLOCKS) == 3


def test_the_files_that_are_linked_exist_and_the_page_is_short():
    links = [link for link in re.findall(r"\]\(([^)]*)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert len(README.splitlines()) <= 220


def test_the_methods_that_are_named_exist():
    named = set(re.findall(r"`([A-Z]\w+)\([^`]*\)`", README))
    assert {"TracInCP", "HyDRA", "SOURCE", "KNNShapley"} <= named
    assert named - {"Scores", "SelfScores"} <= set(lightning_influence.__all__)
