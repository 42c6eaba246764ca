"""Seconds a retrained model: side by side by the bank, through the bank's Trainer path, and by a Trainer alone.

MNIST averaged to 14 x 14, an MLP 196-32-10, 600 examples, 10 epochs in batches of 50: 120 steps a model.

python tests/benchmarks/retraining.py --mnist mnist.npz --threads 2
"""

import argparse
import contextlib
import io
import tempfile
import time

import pytorch_lightning as pl
import torch
from measure import medians
from subjects import QUIET, Classifier, images
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributor, Influence, Refit
from lightning_influence.refit.recipe import Recipe

RATIO = 25  # below what two cores do: what is left is mostly matrix products


class Small(Classifier):
    def __init__(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 10))
        super().__init__(net, lr=0.1, weight_decay=1e-3)


def trainer():
    return pl.Trainer(max_epochs=10, **QUIET)


def loader(data):
    return DataLoader(data, 50, shuffle=True)


def alone(data):
    trainer().fit(Small(), loader(data))


def with_defaults(data):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pl.Trainer(max_epochs=10, default_root_dir=tempfile.mkdtemp()).fit(Small(), loader(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x, y = images(arguments.mnist, 600, 1)[0].tensors
    data = TensorDataset(F.avg_pool2d(x, 2), y)

    recipe, everything = Recipe(Small, trainer, loader, data), torch.ones(600, dtype=torch.bool)
    works = {
        "Trainer, silent": lambda: alone(data),
        "Trainer, its defaults": lambda: with_defaults(data),
        "bank, Trainer path": lambda: recipe.train(everything, 0),
    }
    found = medians(works, 9)
    for name, seconds in found.items():
        print(f"{name:28}{seconds * 1e3:8.1f} ms a model")

    influence = Influence(dirpath=tempfile.mkdtemp())
    model = Small()
    pl.Trainer(max_epochs=10, callbacks=[influence], **QUIET).fit(model, loader(data))
    refit = Refit()
    Attributor(model, train=data, trajectory=influence.attributor.trajectory, refit=refit)
    for turn in ("with the self-check", "side by side"):
        membership = torch.rand(arguments.models, 600) < 0.5
        start = time.perf_counter()
        refit.models.train(membership, [0] * len(membership))
        each = (time.perf_counter() - start) / len(membership)
        ratios = " and ".join(f"{found[name] / each:.0f} x {name}" for name in list(found)[:2])
        print(f"{'bank, ' + turn:28}{each * 1e3:8.1f} ms a model: {ratios}")
    ratio = found["Trainer, silent"] / each
    assert ratio >= RATIO, f"Expected at least {RATIO} x less than a silent Trainer, got {ratio:.0f} x."


if __name__ == "__main__":
    main()
