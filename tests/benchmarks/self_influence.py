"""CPU seconds of self-influence beside an ordinary forward and backward pass over the same data.

python tests/benchmarks/self_influence.py --cifar cifar10_10k2k.npz --texts ag_news
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_influence import EKFAC, SOURCE, GradientDot, HyDRA, InfluenceFunction

from measure import Plain  # isort: skip
from subjects import Encoder, fitted, texts  # isort: skip

CEILING = 3.0  # x the plain pass, for EK-FAC beside its factors


def cnn():
    """33,174 weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 36), nn.ReLU(), nn.Linear(36, 10)),
    )


def photographs(path, n_train):
    """Training examples of CIFAR-10 (an npz with x_train, y_train), else random images; and a few queries."""
    if path is None:
        draw = torch.Generator().manual_seed(0)
        x, y = torch.rand(n_train, 3, 32, 32, generator=draw), torch.randint(0, 10, (n_train,), generator=draw)
    else:
        with np.load(path) as arrays:
            picked = np.random.default_rng(0).permutation(len(arrays["y_train"]))[:n_train]
            x = torch.tensor(arrays["x_train"][picked]).float() / 255
            y = torch.tensor(arrays["y_train"][picked]).long()
        x = x.permute(0, 3, 1, 2).contiguous() if x.shape[-1] == 3 else x
    return TensorDataset(x, y), TensorDataset(x[:8], y[:8])


def cpu_seconds(work):
    """CPU seconds of one run: other programs on the machine count little."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(name, subject, methods, repeats):
    """One table: each method by turns with the plain pass."""
    plain = Plain(subject, (subject.train,), held=True)
    last = subject.checkpoints[-1:]
    plain.subject = type("Last", (), {"checkpoints": last, "at": staticmethod(subject.at)})
    attributor = subject.attributor
    size = sum(p.numel() for p in subject.module.parameters())
    estimates = {label: attributor.cost(method) for label, method in methods.items()}
    print(f"\n{name}: {len(subject.train):,} examples, {size:,} weights")
    first = {label: cpu_seconds(lambda m=m: attributor.self_influence(m)) for label, m in methods.items()}
    taken = {label: [] for label in ("plain pass", *methods)}
    for _ in range(repeats):
        taken["plain pass"].append(cpu_seconds(plain.seconds))
        for label, method in methods.items():
            taken[label].append(cpu_seconds(lambda m=method: attributor.self_influence(m)))
    pass_took = statistics.median(taken["plain pass"])
    for label, seconds in taken.items():
        took = statistics.median(seconds)
        beside = (
            f"   first question, with what is prepared once: {first[label]:.2f} s, estimated {estimates[label]:.2f} s"
            if label in first
            else ""
        )
        print(f"  {label:24s} {took:8.2f} s   {took / pass_took:5.1f} x plain{beside}", flush=True)
        if label.startswith("EK-FAC") and took > CEILING * pass_took:
            print(f"  {label} is above {CEILING:g} x the plain pass")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", help="an npz of CIFAR-10; random images without it")
    parser.add_argument("--texts", help="a folder with AG News; random tokens without it")
    parser.add_argument("--examples", type=int, default=5_000)
    parser.add_argument("--only", choices=["cnn", "transformer"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="also SOURCE, and HyDRA without the Hessian")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = {"GradientDot": GradientDot(), "EK-FAC": InfluenceFunction(EKFAC())}
    if arguments.all:
        methods |= {"SOURCE": SOURCE(2), "HyDRA, no Hessian": HyDRA(hessian=False)}
    with tempfile.TemporaryDirectory() as folder:
        for name, net in (("cnn", cnn), ("transformer", Encoder)):
            if arguments.only not in (None, name):
                continue
            count = arguments.examples
            data = photographs(arguments.cifar, count) if name == "cnn" else texts(arguments.texts, count, 8)
            compare(name, fitted(net(), data, Path(folder) / name, 2), methods, arguments.repeats)


if __name__ == "__main__":
    main()
