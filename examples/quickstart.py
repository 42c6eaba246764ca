"""Which training labels are wrong, and which training examples made this prediction?

Scikit-learn's handwritten digits, a tenth of the training labels flipped, a small convolutional network. One callback
answers both questions when the fit ends:

    python examples/quickstart.py             # seconds on two cores
    python examples/quickstart.py --seeds 5   # the same claim over five seeds
"""

import argparse
import os
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Influence, TracInCP

N_TRAIN, FLIPPED = 1400, 0.10


class Classifier(pl.LightningModule):
    """An ordinary LightningModule, without any influence code."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_accuracy", (self.net(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def noisy_digits(seed):
    """Training data with flipped labels, clean validation data, the true training labels, and the flipped ids."""
    digits, generator = load_digits(), torch.Generator().manual_seed(seed)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=generator)
    images, true = images[order], torch.tensor(digits.target)[order]
    flipped = torch.randperm(N_TRAIN, generator=generator)[: int(FLIPPED * N_TRAIN)]
    labels = true.clone()
    labels[flipped] = (true[flipped] + torch.randint(1, 10, flipped.shape, generator=generator)) % 10
    train, val = (TensorDataset(images[part], labels[part]) for part in (slice(N_TRAIN), slice(N_TRAIN, None)))
    return train, val, true[:N_TRAIN], flipped


def fit(seed, out):
    """Train as usual, with one more callback."""
    pl.seed_everything(seed, verbose=False)
    train, val, true, flipped = noisy_digits(seed)
    model = Classifier()

    influence = Influence([TracInCP()], queries=val, labels=True, self_influence=True)
    trainer = pl.Trainer(
        max_epochs=8, callbacks=[influence], logger=TensorBoardLogger(out, name="digits"), log_every_n_steps=10
    )
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=200))
    return model, influence, train, val, true, flipped


def found(ranking, flipped, fraction):
    """How many flipped labels are in the first part of a ranking."""
    return int(torch.isin(ranking[: int(fraction * len(ranking))], flipped).sum())


def suspicious_labels(influence, flipped, seed):
    """Print how well four rankings find the flipped labels; return the share that the first finds in 20 %."""
    rankings = {
        "labels=True (mean loss)": influence.self_scores["labels"].top(N_TRAIN).train_ids,
        "loss, final weights": influence.attributor.losses().top(N_TRAIN).train_ids,
        "self-influence (TracInCP)": influence.self_scores["TracInCP"].top(N_TRAIN).train_ids,
        "random order": torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(seed)),
    }
    print(f"\nWhich labels are wrong? {len(flipped)} of {N_TRAIN} were flipped. The top of a ranking contains:\n")
    print(f"  {'':28}{'first 10 %':>16}{'first 20 %':>16}")
    for name, ranking in rankings.items():
        counts = [found(ranking, flipped, fraction) for fraction in (0.1, 0.2)]
        cells = "".join(f"{f'{count} ({count / len(flipped):.0%})':>16}" for count in counts)
        print(f"  {name:28}{cells}")
    print(
        "\n  (The mean loss over checkpoints is cheap, and stays a good list where a fit learns wrong labels by heart."
    )
    print("  It cannot answer the next question: it says nothing about what one example does to another.)")
    return found(rankings["labels=True (mean loss)"], flipped, 0.2) / len(flipped)


def wrong_prediction(model, influence, data, flipped, out):
    """Print and draw what caused the model's worst mistake; return that query's opponents and the picture's path."""
    train, val, true = data
    scores = influence.scores["TracInCP"]
    with torch.no_grad():
        logits = model.cpu().eval().net(val.tensors[0])
    labels, predicted = val.tensors[1], logits.argmax(1)
    losses = cross_entropy(logits, labels, reduction="none")
    query = int(torch.where(predicted == labels, 0.0, losses).argmax())

    print(f"\nWhy is validation image {query}, a {labels[query]}, classified as a {predicted[query]}?\n")
    ends = {"proponents": scores.proponents(k=5), "opponents": scores.opponents(k=5)}
    for side, (values, ids) in ends.items():
        effect = "lower" if side == "proponents" else "higher"
        print(f"  strongest {side} (training on them made the loss of this image {effect})")
        for value, i in zip(values[query].tolist(), ids[query].tolist(), strict=True):
            truth = f", really a {true[i]}: a flipped label" if i in flipped else ""
            print(f"    training image {i:>4}  {value:+.3f}  labelled {train.tensors[1][i]}{truth}")
    print("\n  (Flipped labels have large gradients and may be at either end;")
    print("  TracInCP(normalize='cosine') compares directions only and finds similar examples.)")
    figure, _ = scores.plot(query, train=train, queries=val)
    path = Path(out) / "wrong_prediction.png"
    figure.savefig(path, dpi=80)
    return ends["opponents"].train_ids[query], path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--out", default="quickstart_output", help="where to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the network is tiny: more threads only wait for one another

    shares = []
    for seed in range(arguments.seeds):
        model, influence, train, val, true, flipped = fit(seed, arguments.out)
        shares.append(suspicious_labels(influence, flipped, seed))
    if len(shares) > 1:
        print(f"\nThe list found {', '.join(f'{share:.0%}' for share in shares)} of them over {len(shares)} seeds.")
    assert min(shares) >= 0.85, f"Expected 85 % of the flipped labels in the first 20 % of the list, got {shares}."

    opponents, picture = wrong_prediction(model, influence, (train, val, true), flipped, arguments.out)
    assert torch.isin(opponents, flipped).any(), (
        "Expected a flipped label among the opponents of a wrong prediction, got none."
    )

    print("\nWritten:")
    print(f"  {picture}: that query with its proponents and opponents")
    run = os.path.relpath(influence.run_dir)
    print(f"  {run}: checkpoints, batch order, scores")
    print(f"  {os.path.relpath(influence.run_dir.parents[1])}: the same for TensorBoard")
    print("\nNext: TensorBoard in your browser (scalars, images, texts, histograms), the labels to check first, and a")
    print("page to review them on and to download your decisions from:")
    print(f"  tensorboard --logdir {arguments.out}")
    print(f"  lightning-influence top {run}/scores/labels.self.arrow -k 20")
    print(f"  lightning-influence report {run}/scores/TracInCP.arrow -o {arguments.out}/influence.html")


if __name__ == "__main__":
    main()
