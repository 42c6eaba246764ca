"""What `Attributor.cost` estimates against what scoring then takes, for every method on every subject.

python tests/benchmarks/costs.py --mnist mnist.npz --ag-news FOLDER [--subject mlp] [--method SOURCE] [--small]

Scores and self-influence, in CPU seconds of one thread unless ``--wall``. A row that takes long has few queries.
"""

import argparse
import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from subjects import QUIET, Classifier, Encoder, cnn, images, mlp, texts
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    EKFAC,
    SOURCE,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    DataShapley,
    Downsampling,
    ExactGGN,
    ExactHessian,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    KNNShapley,
    LeaveOneOut,
    LiSSA,
    RandomProjection,
    Refit,
    RepresenterPoints,
    TracIn,
    TracInCP,
    TracInIdeal,
    timing,
)

# Estimated over taken, either way. What takes less than the least matters to nobody.
WITHIN, LEAST = 2.0, 0.05


@dataclass
class Fit:
    """A subject: how it is trained, on what, and how many queries are asked."""

    make: Any
    data: tuple
    epochs: int
    batch: int = 256


def tables(n_train, n_queries, width=8):
    """A smooth function of random numbers, with noise."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n_train + n_queries, width, generator=draw)
    y = (x[:, :2].sin().sum(1) + 0.1 * torch.randn(len(x), generator=draw))[:, None]
    return TensorDataset(x[:n_train], y[:n_train]), TensorDataset(x[n_train:], y[n_train:])


def small_mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))


def table_mlp():
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))


def dropped():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10)),
    )


def logistic():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def subjects(mnist=None, ag_news=None, share=1):
    """By name; ``share`` divides the numbers of examples and epochs."""
    momentum = {"lr": 0.01, "momentum": 0.9}

    def digits(train, queries):
        return lambda: images(mnist, train // share, queries // share)

    return {
        "mlp": lambda: Fit(lambda: Classifier(mlp()), digits(5000, 200)(), 5),
        "cnn": lambda: Fit(lambda: Classifier(cnn()), digits(2000, 200)(), 5),
        "transformer": lambda: Fit(
            lambda: Classifier(Encoder(), **momentum), texts(ag_news, 1000 // share, 100 // share), 5
        ),
        "logistic": lambda: Fit(lambda: Classifier(logistic(), lr=0.1), digits(5000, 100)(), 5),
        "long": lambda: Fit(lambda: Classifier(dropped(), **momentum), digits(5000, 100)(), max(5, 50 // share)),
        "adam": lambda: Fit(lambda: Classifier(small_mlp(), make=torch.optim.AdamW, lr=1e-3), digits(2000, 100)(), 10),
        "table": lambda: Fit(
            lambda: Classifier(table_mlp(), loss=F.mse_loss, lr=0.05), tables(2000 // share, 200 // share), 10, batch=50
        ),
        "few": lambda: Fit(lambda: Classifier(table_mlp(), loss=F.mse_loss), tables(24, 20), 10, batch=8),
        "single": lambda: Fit(lambda: Classifier(small_mlp(), lr=0.01), digits(400, 40)(), 1, batch=1),
    }


@dataclass
class Row:
    """A method: how many queries it is asked (None: all), whether it has self-influence, and what it runs on."""

    method: Any
    queries: int | None = None
    itself: bool = True
    parameters: int | None = None
    only: tuple = ()
    retrains: bool = False
    without: tuple = ()


ROWS = {
    "GradientDot": Row(GradientDot()),
    "GradientDot projected": Row(GradientDot(projection=RandomProjection(dim=512))),
    "TracInCP": Row(TracInCP()),
    "TracInCP cosine": Row(TracInCP(normalize="cosine"), itself=False),
    "TracIn": Row(TracIn(), queries=20),
    "TracInIdeal": Row(TracInIdeal(), itself=False, only=("single",)),
    "HyDRA": Row(HyDRA(), queries=5, itself=False),
    "HyDRA itself": Row(HyDRA(checks=0), queries=20, only=("few", "single")),
    "HyDRA fast": Row(HyDRA(hessian=False, checks=0), queries=20),
    "HyDRA runs": Row(HyDRA(runs=2, checks=0), queries=5, itself=False, only=("table", "logistic", "adam")),
    "HyDRA during": Row(HyDRA.during_fit(hessian=False), only=("table", "logistic")),
    "SOURCE": Row(SOURCE()),
    "SOURCE exact": Row(SOURCE(curvature=ExactGGN()), parameters=1000),
    "EKFAC": Row(InfluenceFunction(EKFAC())),
    "EKFAC exact ranks": Row(InfluenceFunction(EKFAC(tolerance=0)), itself=False),
    "EKFAC sampled": Row(InfluenceFunction(EKFAC(labels="sampled"))),
    "EKFAC relatif": Row(InfluenceFunction(EKFAC(), normalize="relatif")),
    "KFAC": Row(InfluenceFunction(EKFAC(corrected=False))),
    "CG": Row(InfluenceFunction(ConjugateGradient()), queries=2, parameters=20_000),
    "LiSSA": Row(InfluenceFunction(LiSSA()), queries=2, parameters=20_000),
    "Arnoldi": Row(InfluenceFunction(Arnoldi(steps=50)), queries=20, parameters=300_000),
    "ExactGGN": Row(InfluenceFunction(ExactGGN()), parameters=1000),
    "ExactHessian": Row(InfluenceFunction(ExactHessian()), parameters=1000),
    "RepresenterPoints": Row(RepresenterPoints()),
    "RepresenterPoints as trained": Row(RepresenterPoints(refit=False)),
    "KNNShapley": Row(KNNShapley(), itself=False, without=("table", "few")),
    "LeaveOneOut": Row(LeaveOneOut(examples=tuple(range(10))), itself=False, retrains=True),
    "Downsampling": Row(Downsampling(n_models=20), retrains=True),
    "DataShapley": Row(DataShapley(budget=50), itself=False, retrains=True, only=("few",)),
}


def fitted(fit, folder, tracked=()):
    """The module, trained with the callback."""
    torch.manual_seed(0)
    module = fit.make()
    influence = Influence(methods=list(tracked), queries=fit.data[1] if tracked else None, dirpath=folder, max_cost=1e9)
    trainer = pl.Trainer(max_epochs=fit.epochs, callbacks=[influence], **QUIET)
    trainer.fit(module, DataLoader(fit.data[0], fit.batch, shuffle=True))
    return module, influence.attributor.trajectory


def first(data, count):
    return data if count is None else TensorDataset(*(tensor[:count] for tensor in data.tensors))


@dataclass
class Measured:
    """One line of the table."""

    subject: str
    method: str
    what: str
    queries: int
    estimating: float
    estimated: float
    taken: float
    parts: tuple = ()

    @property
    def ratio(self):
        return (self.estimated + LEAST) / (self.taken + LEAST)

    @property
    def off(self):
        return max(self.ratio, 1 / self.ratio)

    def __str__(self):
        about = f"{self.subject:12} {self.method:28} {self.what:7} {self.queries:5}"
        return f"{about} {self.estimating:9.3f} {self.estimated:9.3f} {self.taken:9.3f} {self.ratio:7.2f}"


def spent(work):
    gc.collect()
    gc.disable()  # which takes a third of a second where much is in memory, at any time
    start = timing.clock()
    result = work()
    seconds = timing.clock() - start
    gc.enable()
    return seconds, result


def measure(subject, name, row, fit, module, trajectory, folder):
    """The lines of one method on one subject; nothing is kept on disk from one line to the next."""
    size = sum(p.numel() for p in module.parameters())
    if (row.only and subject not in row.only) or subject in row.without or (row.parameters and size > row.parameters):
        return
    queries = first(fit.data[1], row.queries)
    for what in ("scores", "itself")[: 1 + row.itself]:
        with tempfile.TemporaryDirectory(dir=folder) as models:
            for folder_of in ("curvature", "features"):
                for path in (trajectory.path / folder_of).glob("*"):
                    path.unlink()
            refit = Refit(dirpath=models) if row.retrains else None
            attributor = Attributor(module, train=fit.data[0], trajectory=trajectory, refit=refit)
            asked = queries if what == "scores" else None
            try:
                estimating, estimate = spent(lambda: attributor._cost(row.method, asked))
                if what == "scores":
                    taken, _ = spent(lambda: attributor.score(row.method, queries))
                else:
                    taken, _ = spent(lambda: attributor.self_influence(row.method))
            except ValueError as error:  # such as gradients that are not finite
                print(f"{subject:12} {name:28} {what:7} refused: {str(error)[:60]}", flush=True)
                continue
            yield Measured(
                *(subject, name, what, len(queries) if what == "scores" else 0),
                *(estimating, estimate.seconds, taken, estimate.work),
            )


def table(names, rows, paths, share=1, show=lambda line: None):
    """All lines, each passed to ``show`` as soon as it is there."""
    lines = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            fit = subjects(*paths, share)[name]()
            tracked = [row.method for row in rows.values() if row.method.tracker() and name in row.only]
            module, trajectory = fitted(fit, Path(folder) / "runs", tracked)
            gc.collect()
            gc.freeze()  # to look through all there is takes as long as most lines do
            for method, row in rows.items():
                for line in measure(name, method, row, fit, module, trajectory, folder):
                    lines.append(line)
                    show(line)
            gc.unfreeze()
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", help="an npz with x_train, y_train, x_test, y_test; random images without it")
    parser.add_argument("--ag-news", help="a folder with train*.parquet and test.parquet; random tokens without it")
    parser.add_argument("--subject", nargs="*", choices=list(subjects()), help="some of the subjects")
    parser.add_argument("--method", nargs="*", choices=list(ROWS), help="some of the methods")
    parser.add_argument("--small", action="store_true", help="a tenth of the examples")
    parser.add_argument("--parts", action="store_true", help="what each estimate is made of")
    parser.add_argument("--wall", action="store_true", help="wall-clock seconds, on an idle machine")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.wall:
        timing.clock = time.process_time

    def show(line):
        print(line, flush=True)
        for part in line.parts if asked.parts else ():
            print(f"    {part}")

    print(
        f"{'subject':12} {'method':28} {'what':7} {'query':>5} {'to ask':>9} {'estimate':>9} {'taken':>9} {'ratio':>7}"
    )
    rows = {name: row for name, row in ROWS.items() if not asked.method or name in asked.method}
    paths = asked.mnist, asked.ag_news
    lines = table(asked.subject or list(subjects()), rows, paths, 10 if asked.small else 1, show)
    wrong = [line for line in lines if line.off > WITHIN]
    worst = max(lines, key=lambda line: line.off)
    print(
        f"worst: {worst.off:.2f}, {worst.method} on {worst.subject}; {len(wrong)} of {len(lines)} beyond {WITHIN:g} x"
    )


if __name__ == "__main__":
    main()
