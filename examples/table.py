"""A table: which rows influenced a classifier, and which of their labels are wrong.

Scikit-learn's breast cancer table (30 measurements of 569 tumours), a tenth of the training labels flipped.

    python examples/table.py
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Influence, TracInCP

N_TRAIN, OUT = 400, Path("table_output")


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main():
    pl.seed_everything(0, verbose=False)
    table = load_breast_cancer()
    order = torch.randperm(len(table.data))
    measured, labels = torch.tensor(table.data, dtype=torch.float32)[order], torch.tensor(table.target)[order]
    values = (measured - measured[:N_TRAIN].mean(0)) / measured[:N_TRAIN].std(0)
    flipped = torch.randperm(N_TRAIN)[: N_TRAIN // 10]
    labels[flipped] = 1 - labels[flipped]
    train = TensorDataset(values[:N_TRAIN], labels[:N_TRAIN])
    test = TensorDataset(values[N_TRAIN:], labels[N_TRAIN:])

    influence = Influence([TracInCP()], queries=test, self_influence=True, dirpath=OUT)
    trainer = pl.Trainer(max_epochs=10, callbacks=[influence], logger=False, enable_checkpointing=False)
    model = Classifier()
    trainer.fit(model, DataLoader(train, batch_size=20, shuffle=True))
    scores, itself = influence.scores["TracInCP"], influence.self_scores["TracInCP"]

    with torch.no_grad():
        logits = model.cpu().eval().net(test.tensors[0])
    query = int(cross_entropy(logits, test.tensors[1], reduction="none").argmax())
    # Show the measurements as people read them, not the standardised inputs of the network.
    shown = [TensorDataset(measured[part], labels[part]) for part in (slice(N_TRAIN), slice(N_TRAIN, None))]
    looks = {"train": shown[0], "queries": shown[1], "columns": table.feature_names}
    looks |= {"labels": table.target_names, "predictions": logits.argmax(1)}
    figure, _ = scores.plot(query, k=3, **looks)
    figure.savefig(OUT / "row.png", dpi=80)
    itself.plot()[0].savefig(OUT / "self_influence.png", dpi=80)
    page = scores.report(OUT / "influence.html", self_scores=itself, **looks)

    found = torch.isin(flipped, itself.top(N_TRAIN // 5).train_ids).double().mean().item()
    print(f"{found:.0%} of the flipped labels are in the first fifth by self-influence.")
    print(f"Written: {OUT / 'row.png'}, {OUT / 'self_influence.png'}, and a page to review the labels on: {page}")
    assert found >= 0.8


if __name__ == "__main__":
    main()
