"""Influence for a run that was trained without the callback: its Lightning checkpoints are enough.

python examples/from_checkpoints.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributor, TracInCP, Trajectory

N_TRAIN, EPOCHS = 1000, 6
LEARNING_RATES = [0.1, 0.1, 0.1, 0.02, 0.02, 0.02]


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=LEARNING_RATES[0], momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: LEARNING_RATES[min(epoch, EPOCHS - 1)] / LEARNING_RATES[0]
        )
        return [optimizer], [schedule]


def noisy_digits():
    """Training data with a tenth of the labels flipped, clean queries, and the ids of the flipped ones."""
    digits = load_digits()
    order = torch.randperm(len(digits.data))
    images, labels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
    flipped = torch.randperm(N_TRAIN)[: N_TRAIN // 10]
    labels[flipped] = (labels[flipped] + torch.randint(1, 10, flipped.shape)) % 10
    train = TensorDataset(images[:N_TRAIN], labels[:N_TRAIN])
    return train, TensorDataset(images[N_TRAIN : N_TRAIN + 200], labels[N_TRAIN : N_TRAIN + 200]), flipped


def train_without_callback(train, folder):
    """A fit that writes Lightning's own checkpoints only."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=[keep], logger=False)
    trainer.fit(Classifier(), DataLoader(train, batch_size=32, shuffle=True))
    return [Path(folder) / f"epoch={epoch}.ckpt" for epoch in range(EPOCHS)]


def main():
    pl.seed_everything(0, verbose=False)
    train, queries, flipped = noisy_digits()
    with TemporaryDirectory() as folder:
        paths = train_without_callback(train, folder)

        # Lightning stores the learning rate of the next step; with a schedule, pass the rates that were applied.
        trajectory = Trajectory.from_checkpoints(paths, learning_rates=LEARNING_RATES)
        attributor = Attributor(Classifier(), train=train, trajectory=trajectory)
        scores = attributor.score(TracInCP(normalize="cosine"), queries)
        suspicious = attributor.self_influence(TracInCP()).top(N_TRAIN // 5)

    print(f"\n{scores}\n")
    found = torch.isin(flipped, suspicious.train_ids).double().mean().item()
    labels = train.tensors[1][scores.proponents(k=1).train_ids[:, 0]]
    alike = (labels == queries.tensors[1]).double().mean().item()
    print(f"{found:.0%} of the flipped labels are in the first fifth by self-influence.")
    print(f"{alike:.0%} of the queries have a strongest proponent of their own class.")
    assert found >= 0.85
    assert alike >= 0.95


if __name__ == "__main__":
    main()
