"""What recording costs a fit: CNN or MLP with one checkpoint an epoch, by the clock inside the callback and end to end.

The share of a fit that passes inside the callback's own code is repeatable. Whole fits with and without it, in turn,
include what the clock inside does not see, and differ among themselves by more than what is measured.

python tests/benchmarks/capture.py --mnist mnist.npz
python tests/benchmarks/capture.py --model mlp --batch 20
"""

import argparse
import functools
import statistics
import tempfile
import time

import pytorch_lightning as pl
import torch
from subjects import QUIET, Classifier, cnn, images, mlp
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_influence import Influence
from lightning_influence.capture.loaders import Deliveries

CEILING = 0.03
CEILING_MS = 0.3
MODELS = {"cnn": cnn, "mlp": mlp}


class Clock:
    """Seconds inside of some functions, which are put back at the end."""

    def __init__(self, **functions):
        self.seconds = dict.fromkeys(functions, 0.0)
        self._functions = functions

    def __enter__(self):
        self._before = [(owner, name, vars(owner)[name]) for f in self._functions.values() for owner, name in f]
        for kind, functions in self._functions.items():
            for owner, name in functions:
                setattr(owner, name, self._timed(kind, vars(owner)[name]))
        return self

    def __exit__(self, *_):
        for owner, name, function in self._before:
            setattr(owner, name, function)

    def _timed(self, kind, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[kind] += time.perf_counter() - start

        return timed


HOOKS = [(Influence, name) for name in vars(Influence) if name.startswith("on_") or name in ("setup", "teardown")]


def fit(arguments, data, epochs, *callbacks):
    """Seconds."""
    torch.manual_seed(0)
    module = Classifier(MODELS[arguments.model]())
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **QUIET)
    loader = DataLoader(data, arguments.batch, shuffle=True)
    start = time.perf_counter()
    trainer.fit(module, loader)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="an npz with x_train, y_train, x_test, y_test; random images without it")
    parser.add_argument("--model", choices=MODELS, default="cnn")
    parser.add_argument("--train", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    data, _ = images(arguments.mnist, arguments.train, 1)
    bare, watched, shares = [], [], []
    fit(arguments, data, 1)
    for _ in range(arguments.repeats):
        bare.append(fit(arguments, data, arguments.epochs))
        with tempfile.TemporaryDirectory() as folder:
            watched.append(fit(arguments, data, arguments.epochs, Influence(dirpath=folder)))
        with tempfile.TemporaryDirectory() as folder:
            loader = {"ours": [(Deliveries, "__next__")], "torch": [(_BaseDataLoaderIter, "__next__")]}
            with Clock(hooks=HOOKS, **loader) as clock:
                whole = fit(arguments, data, arguments.epochs, Influence(dirpath=folder))
            inside = clock.seconds["hooks"] + clock.seconds["ours"] - clock.seconds["torch"]
            shares.append(inside / (whole - inside))
    steps = arguments.epochs * -(-arguments.train // arguments.batch)
    without, with_it = statistics.median(bare), statistics.median(watched)
    share = statistics.median(shares)
    print(
        f"inside the callback: {share:+.1%} of the fit (at most {CEILING:+.0%}), {min(shares):.1%} to {max(shares):.1%}"
    )
    print(
        f"end to end, {steps} steps: {without:.3f} s without, {with_it:.3f} s with it ({with_it / without - 1:+.1%});"
    )
    print(f"{(with_it - without) / steps * 1e3:.2f} ms a step (at most {CEILING_MS} ms)")
    print(f"fits without it range from {min(bare):.3f} to {max(bare):.3f} s")


if __name__ == "__main__":
    main()
