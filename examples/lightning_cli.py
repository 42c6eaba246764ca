"""Configure the callback and its methods in YAML with LightningCLI, without any influence code in the program.

    python examples/lightning_cli.py                                              # seconds: fits lightning_cli.yaml
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --trainer.max_epochs 4
    python examples/lightning_cli.py fit --trainer.callbacks.help lightning_influence.Influence

Needs `pip install "jsonargparse[signatures]"`. To use `lightning.pytorch`, replace the two imports below.
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Influence

CONFIG = Path(__file__).with_suffix(".yaml")


class Digits(pl.LightningDataModule):
    """Scikit-learn's handwritten digits; the first labels of the training set are wrong.

    Args:
        flipped: How many labels are wrong.
        batch_size: Examples per step.
    """

    def __init__(self, flipped: int = 60, batch_size: int = 32):
        super().__init__()
        digits = load_digits()
        images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
        wrong = labels.clone()
        wrong[:flipped] = (labels[:flipped] + 1) % 10
        self.flipped, self.batch_size = flipped, batch_size
        self.train, self.val = TensorDataset(images[:1000], wrong[:1000]), TensorDataset(images[1000:], labels[1000:])

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 200)


class Classifier(pl.LightningModule):
    """A small network.

    Args:
        width: Width of the hidden layer.
        lr: Learning rate.
    """

    def __init__(self, width: int = 32, lr: float = 0.1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def main():
    if len(sys.argv) == 1:
        sys.argv += ["fit", "--config", str(CONFIG)]
    cli = LightningCLI(Classifier, Digits)
    influence = next((c for c in cli.trainer.callbacks if isinstance(c, Influence)), None)
    if influence is None or influence.run_dir is None or "TracInCP" not in influence.self_scores:
        return  # another command, or a configuration with other methods
    first = influence.self_scores["TracInCP"].top(200).train_ids
    found = int((first < cli.datamodule.flipped).sum())
    print(f"\n{found} of {cli.datamodule.flipped} wrong labels are in the first fifth by self-influence.")
    print(f"Scores of {', '.join(influence.scores)}: lightning-influence show {influence.run_dir}")
    if sys.argv[1:] == ["fit", "--config", str(CONFIG)]:
        assert set(influence.scores) == {"TracInCP", "GradientDot"}, (
            f"Expected two methods, got {set(influence.scores)}."
        )
        assert found >= 0.8 * cli.datamodule.flipped, f"Expected 80 % of the wrong labels, got {found}."


if __name__ == "__main__":
    main()
