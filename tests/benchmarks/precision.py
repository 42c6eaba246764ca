"""How well float32 scores agree with those in float64, also for queries of which the model is certain.

python tests/benchmarks/precision.py --mnist mnist.npz

An MLP with dropout, trained on MNIST for 50 epochs by SGD with momentum until most queries have next to no loss. For
each query and method, the rank correlation over the training examples of the scores in float32 with those of the same
weights and data in float64: the median and the worst of all queries, and of those with a loss below 1e-7.
"""

import copy
import tempfile
import time
from pathlib import Path

import torch
from subjects import arguments_of, fitted, images, mlp
from torch.utils.data import TensorDataset

from lightning_influence import EKFAC, SOURCE, Attributor, GradientDot, InfluenceFunction, TracInCP, Trajectory
from lightning_influence.numerics.statistics import spearman

METHODS = {
    "GradientDot": GradientDot(),
    "TracInCP": TracInCP(),
    "EK-FAC": InfluenceFunction(EKFAC()),
    "SOURCE": SOURCE(),
}
CERTAIN = 1e-7


def in_double(data):
    images, labels = data.tensors
    return TensorDataset(images.double(), labels)


def scored(subject, trajectory, method, dtype):
    """Scores [query, train] in one precision."""
    module, train, queries = copy.deepcopy(subject.module), subject.train, subject.queries
    if dtype is torch.float64:
        module, train, queries = module.double(), in_double(train), in_double(queries)
    return Attributor(module, train, trajectory).score(method, queries).values


def row(agreement):
    """Median and worst of some queries, and how many of them agree to less than 0.99."""
    if not len(agreement):
        return f"{'none':>24}"
    return f"{float(agreement.median()):8.5f} {float(agreement.min()):8.5f} {int((agreement < 0.99).sum()):6}"


def main():
    parser = arguments_of(__doc__)
    parser.add_argument("--only", choices=list(METHODS), help="one of the methods")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="a few examples: does it run?")
    arguments = parser.parse_args()
    n, n_queries, epochs = (300, 20, 3) if arguments.quick else (5_000, 500, arguments.epochs)
    with tempfile.TemporaryDirectory() as folder:
        subject = fitted(
            mlp(128, 0.1),
            images(arguments.mnist, n, n_queries),
            Path(folder),
            epochs,
            momentum=0.9,
            batch=64,
        )
        trajectory = Trajectory.load(folder)
        losses = Attributor(copy.deepcopy(subject.module), subject.train, trajectory).losses(subject.queries).values
        certain = losses < CERTAIN
        print(
            f"{n} examples, {n_queries} queries, {epochs} epochs; {float(certain.double().mean()):.1%} of the queries"
        )
        print(f"have a loss below {CERTAIN:g}, the smallest {float(losses.min()):.1e}\n")
        print(f"{'':14} {'all queries':>24}   {'those':>24}")
        print(f"{'':14} {'median':>8} {'worst':>8} {'<0.99':>6}   {'median':>8} {'worst':>8} {'<0.99':>6}")
        for name, method in METHODS.items():
            if arguments.only not in (None, name):
                continue
            clock = time.perf_counter()
            single, double = (scored(subject, trajectory, method, d) for d in (torch.float32, torch.float64))
            agreement = spearman(single.double(), double)
            print(
                f"{name:14} {row(agreement)}   {row(agreement[certain])}   {time.perf_counter() - clock:6.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
