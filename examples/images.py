"""Images: which training examples caused a network's mistakes, as a figure of several queries and as a page to review.

Scikit-learn's handwritten digits, a small convolutional network.

    python examples/images.py
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Influence, TracInCP

N_TRAIN, OUT = 900, Path("images_output")


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        convolution = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.net = nn.Sequential(*convolution, nn.Flatten(), nn.Linear(256, 10))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main():
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    order = torch.randperm(len(digits.images))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    train = TensorDataset(images[:N_TRAIN], labels[:N_TRAIN])
    test = TensorDataset(images[N_TRAIN:], labels[N_TRAIN:])

    # Compares the direction of gradients, not their length: finds what looks alike rather than what was hard to learn.
    method = TracInCP(normalize="cosine")
    influence = Influence([method], queries=test, dirpath=OUT)
    trainer = pl.Trainer(max_epochs=6, callbacks=[influence], logger=False, enable_checkpointing=False)
    model = Classifier()
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))
    scores = influence.scores["TracInCP"]

    with torch.no_grad():
        predictions = model.cpu().eval().net(test.tensors[0]).argmax(1)
    wrong = (predictions != test.tensors[1]).nonzero().flatten()
    figure, _ = scores.plot(wrong[:3].tolist(), k=4, predictions=predictions)
    figure.savefig(OUT / "mistakes.png", dpi=80)
    scores.plot_classes()[0].savefig(OUT / "classes.png", dpi=80)
    # One file that needs no network, so that you can send it to a colleague.
    page = scores.report(OUT / "influence.html", predictions=predictions)

    strongest = train.tensors[1][scores.proponents(k=1).train_ids[:, 0]]
    alike = (strongest == test.tensors[1]).double().mean().item()
    print(f"{len(wrong)} of {len(test)} digits are misread.")
    print(f"{alike:.0%} of the queries have a strongest proponent of their own class.")
    print(f"Written: {OUT / 'mistakes.png'}, {OUT / 'classes.png'}, and a page to review: {page}")
    assert alike >= 0.95


if __name__ == "__main__":
    main()
