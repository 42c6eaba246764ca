"""Whether scores with the unit "loss" are changes of the loss: slopes against exact leave-one-out, by optimizer.

pip install scikit-learn
python tests/benchmarks/units.py [--mnist mnist.npz] [--examples 300] [--rows adamw]

A small MLP on scikit-learn's digits, a tenth of them with wrong labels, or on MNIST averaged to 14 x 14, by each
optimizer and for several lengths of training. Exact leave-one-out replays the captured run with the weight of one
example set to 0, for 80 examples; the table has the slope of the predicted changes over the measured ones, for
self-influence and for 40 queries, and the mean Spearman correlation of the latter. With the unit "loss" the slope of
self-influence is within a factor of 3 of 1, or this fails.
"""

import argparse
import tempfile

import pytorch_lightning as pl
import torch
from quality import digits
from subjects import halved
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    EKFAC,
    SOURCE,
    Attributor,
    ConjugateGradient,
    HyDRA,
    Influence,
    InfluenceFunction,
    Refit,
    Trajectory,
)
from lightning_influence.numerics.statistics import slope, spearman

LEFT_OUT, QUERIES, WIDTH = 80, 40, 16
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, 3e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 3e-3, weight_decay=1e-2),
}
EPOCHS = {"sgd": (10, 40), "momentum": (5, 20), "adam": (5, 15, 60), "adamw": (5, 15, 60)}
METHODS = {
    "EK-FAC": InfluenceFunction(EKFAC()),
    "CG, GGN": InfluenceFunction(ConjugateGradient()),
    "EK-FAC, damping 1e-6": InfluenceFunction(EKFAC(1e-6)),
    "SOURCE": SOURCE(),
    "HyDRA": HyDRA(checks=0),
}
UNCHECKED = ("SOURCE", "HyDRA")


class Small(pl.LightningModule):
    def __init__(self, inputs, optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, WIDTH), nn.GELU(), nn.Linear(WIDTH, 10)).double()
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.parameters())


def images(path, n):
    x, y = halved(path, torch.float64)
    return TensorDataset(x[:n], y[:n]), TensorDataset(x[-QUERIES:], y[-QUERIES:])


def fitted(optimizer, epochs, train, folder, batch=50):
    """An attributor of one captured fit."""
    pl.seed_everything(0, verbose=False)
    module = Small(train.tensors[0][0].numel(), optimizer)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[Influence(dirpath=folder, every_n_epochs=max(1, epochs // 10))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, batch, shuffle=True))
    return module, Trajectory.load(folder)


def left_out(module, trajectory, train, queries, count):
    """The attributor, what is asked (the examples left out, then the queries), their ids, and what changed."""
    ids = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:count].sort().values
    asked = TensorDataset(*(torch.cat([a[ids], b]) for a, b in zip(train.tensors, queries.tensors, strict=True)))
    refit = Refit()
    attributor = Attributor(module, train, trajectory, refit=refit)
    return attributor, asked, ids, refit.bank(asked, leave_out=ids.tolist()).changes


def slopes(found, changes):
    """Of self-influence and of the queries, and the latter's mean rank correlation; all [asked, left out]."""
    found, count = found.double(), found.shape[1]
    own = float(slope(found[:count].diagonal()[None], changes[:count].diagonal()[None]))
    return own, float(slope(found[count:], changes[count:])), float(spearman(found[count:], changes[count:]).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="an npz with x_test and y_test, in place of scikit-learn's digits")
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--rows", default="", help="only optimizers whose name contains this")
    parser.add_argument("--quick", action="store_true", help="the shortest fits and three methods: does it run?")
    arguments = parser.parse_args()
    if arguments.mnist:
        train, queries = images(arguments.mnist, arguments.examples)
    else:
        train, queries = (
            TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in digits(arguments.examples, QUERIES)
        )
    wrong = []
    print(
        f"{'fit':20}{'train loss':>11}  {'method':22}{'units':>10}{'leverage':>9}{'self':>9}{'queries':>9}{'rank':>6}"
    )
    for optimizer, lengths in EPOCHS.items():
        for epochs in lengths[: 1 if arguments.quick else None] if arguments.rows in optimizer else ():
            with tempfile.TemporaryDirectory() as folder:
                fit = fitted(optimizer, epochs, train, folder)
                attributor, asked, ids, changes = left_out(*fit, train, queries, LEFT_OUT)
                loss = float(attributor.losses().values.mean())
                for name, method in list(METHODS.items())[: 3 if arguments.quick else None]:
                    scores = attributor.score(method, asked)
                    own, other, rank = slopes(scores.values[:, ids], changes)
                    leverage = scores.diagnostics.get("leverage", float("nan"))
                    print(
                        f"{optimizer + f', {epochs} epochs':20}{loss:11.3f}  {name:22}{scores.units:>10}{leverage:9.2f}"
                        f"{own:9.3g}{other:9.3g}{rank:6.2f}",
                        flush=True,
                    )
                    if scores.units == "loss" and name not in UNCHECKED and not 1 / 3 <= own <= 3:
                        wrong.append(f"{name} after {optimizer}, {epochs} epochs: {own:.3g}")
    assert not wrong, f"Expected slopes within a factor of 3 of 1 with the unit loss, got {'; '.join(wrong)}."


if __name__ == "__main__":
    main()
