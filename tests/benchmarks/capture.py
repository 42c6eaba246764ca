"""What recording costs a fit: the CNN with one checkpoint an epoch, with and without the callback, in turn.

python tests/benchmarks/capture.py --mnist mnist.npz
"""

import argparse
import statistics
import tempfile
import time

import pytorch_lightning as pl
import torch
from subjects import QUIET, Classifier, cnn, images
from torch.utils.data import DataLoader

from lightning_influence import Influence

CEILING = 0.03


def fit(data, epochs, batch, *callbacks):
    """Seconds."""
    torch.manual_seed(0)
    module = Classifier(cnn())
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **QUIET)
    loader = DataLoader(data, batch, shuffle=True)
    start = time.perf_counter()
    trainer.fit(module, loader)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="an npz with x_train, y_train, x_test, y_test; random images without it")
    parser.add_argument("--train", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    data, _ = images(arguments.mnist, arguments.train, 1)
    bare, watched = [], []
    fit(data, 1, arguments.batch)
    for _ in range(arguments.repeats):
        bare.append(fit(data, arguments.epochs, arguments.batch))
        with tempfile.TemporaryDirectory() as folder:
            watched.append(fit(data, arguments.epochs, arguments.batch, Influence(dirpath=folder)))
    steps = arguments.epochs * -(-arguments.train // arguments.batch)
    without, with_it = statistics.median(bare), statistics.median(watched)
    step = (with_it - without) / steps * 1e3
    print(f"{steps} steps: {without:.3f} s without, {with_it:.3f} s with the callback")
    print(f"{with_it / without - 1:+.1%} (at most {CEILING:+.0%}), {step:+.2f} ms a step")
    print(f"fastest of each: {min(bare):.3f} s and {min(watched):.3f} s ({min(watched) / min(bare) - 1:+.1%})")


if __name__ == "__main__":
    main()
