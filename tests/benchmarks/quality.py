"""How well the methods predict what training without some examples does: linear datamodeling scores.

pip install scipy
python tests/benchmarks/quality.py --mnist mnist.npz
python tests/benchmarks/quality.py --digits [--adamw]

Two settings of a small MLP on 600 images (14 x 14) and 40 queries; with `--digits` another on a thousand of
scikit-learn's digits, a tenth of them with wrong labels. Every run is one `Trainer.fit` with `Influence`; what the
methods of the package predict from it is compared with models trained again without some of the examples, all of them
at once by `torch.func.vmap`: *fixed seed* from the same initial weights in the same order of batches with 90 % of the
data (99 % of the digits; the others' weights are 0), *averaged* with half of the data, the mean of 5 independent seeds.
A figure is the mean over queries of the Spearman correlation between predicted and true losses over 100 subsets, and
then the mean of 3 runs.
"""

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from scipy.stats import spearmanr
from subjects import halved
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    EKFAC,
    SOURCE,
    Arnoldi,
    Attributor,
    ConjugateGradient,
    ExactGGN,
    GradientDot,
    HyDRA,
    Influence,
    InfluenceFunction,
    LiSSA,
    TracInCP,
    Trajectory,
)

BATCH, DECAY, SUBSETS, SEEDS = 50, 1e-3, 100, 5


@dataclass(frozen=True)
class Task:
    """A network and how it is trained.

    Args:
        widths: of its two layers.
        activation: between them.
        momentum: of SGD.
        rate: learning rate, at the start of a cosine or constant.
        cosine: whether the rate falls to zero.
        epochs: how many.
        kept: share of the data that stays with a fixed seed.
        adamw: by AdamW in place of SGD.
    """

    widths: tuple[int, int]
    activation: type[nn.Module]
    momentum: float
    rate: float
    cosine: bool = False
    epochs: int = 10
    kept: float = 0.9
    adamw: bool = False

    def net(self):
        inside, outside = self.widths
        return nn.Sequential(nn.Flatten(), nn.Linear(inside, outside), self.activation(), nn.Linear(outside, 10))

    def rates(self, steps):
        if not self.cosine:
            return [self.rate] * steps
        return [self.rate * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


SETTINGS = {
    "ReLU, SGD lr 0.1": Task((196, 32), nn.ReLU, 0.0, 0.1),
    "GELU, momentum 0.9, lr 0.05": Task((196, 32), nn.GELU, 0.9, 0.05),
}
DIGITS = "digits, 10 % of the labels wrong, GELU, momentum 0.9, cosine from 0.05"
DIGITS_TASK = Task((64, 32), nn.GELU, 0.9, 0.05, cosine=True, epochs=12, kept=0.99)
ADAMW = "digits, 10 % of the labels wrong, GELU, AdamW lr 0.003"
ADAMW_TASK = Task((64, 32), nn.GELU, 0.0, 3e-3, epochs=12, kept=0.99, adamw=True)
# Next to nothing for a root of mean squares, and enough for derivatives where a gradient was always zero.
EPSILON = 1e-4
DENSE = "influence function, dense GGN, default damping"
DAMPINGS = (1e-1, 1e-2, 1e-3)


def methods():
    """Rows of the table: name -> methods of which the best counts (another one is one line here)."""
    return {
        "gradient dot, final weights": [GradientDot()],
        "TracInCP, 10 checkpoints": [TracInCP()],
        "influence function, GGN, default damping": [InfluenceFunction(ConjugateGradient())],
        "influence function, GGN, best of 3 dampings": [InfluenceFunction(ConjugateGradient(d)) for d in DAMPINGS],
        "influence function, EK-FAC, default damping": [InfluenceFunction(EKFAC())],
        "influence function, EK-FAC, best of 4 dampings": [InfluenceFunction(EKFAC(d)) for d in (1.0, *DAMPINGS)],
        "SOURCE, 3 segments, EK-FAC": [SOURCE(3, EKFAC())],
        "SOURCE, 3 segments, GGN": [SOURCE(3, ExactGGN())],
        "HyDRA, exact": [HyDRA(checks=0)],
        "HyDRA, mean of 40 runs": [HyDRA(runs=40, checks=0)],
        "influence function, LiSSA": [InfluenceFunction(LiSSA())],
        "influence function, Arnoldi (200 steps)": [InfluenceFunction(Arnoldi())],
        "influence function, Arnoldi, rest dropped": [InfluenceFunction(Arnoldi(complement="drop"))],
        DENSE: [InfluenceFunction(ExactGGN())],
    }


class Small(pl.LightningModule):
    def __init__(self, task, steps):
        super().__init__()
        self.net, self.task, self.steps = task.net(), task, steps

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        rates = self.task.rates(self.steps)
        if self.task.adamw:
            optimizer = torch.optim.AdamW(self.parameters(), 1.0, eps=EPSILON, weight_decay=DECAY)
        else:
            optimizer = torch.optim.SGD(self.parameters(), 1.0, momentum=self.task.momentum, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*rates, 0.0][step])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def images(path, n, n_queries):
    x, y = halved(path)
    return TensorDataset(x[:n], y[:n]), TensorDataset(x[9_000 : 9_000 + n_queries], y[9_000 : 9_000 + n_queries])


def digits(n, n_queries):
    """Scikit-learn's digits, a tenth of the training labels wrong."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=draw)
    x, y = x[order].float() / 16, y[order]
    wrong = torch.randperm(n, generator=draw)[: n // 10]
    labels = y[:n].clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=draw)) % 10
    return TensorDataset(x[:n], labels), TensorDataset(x[-n_queries:], y[-n_queries:])


class Truth:
    """Many models trained at once, each with its own weights of the examples."""

    def __init__(self, task, train, queries):
        self.task, self.train, self.queries = task, train.tensors, queries.tensors
        self.net = task.net()

    def losses(self, weights, order, start):
        """[model, query] after training; `weights` [model, train], `order` the ids of each batch."""
        count = len(weights)
        p = {name: value.expand(count, *value.shape).clone() for name, value in start.items()}
        state = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in p.items()}
        gradient = vmap(grad(self._loss), (0, None, None, 0))
        for step, (ids, rate) in enumerate(zip(order, self.task.rates(len(order)), strict=True), start=1):
            g = gradient(p, self.train[0][ids], self.train[1][ids], weights[:, ids])
            moved = {name: self._moved(p[name], g[name], state[name], rate, step) for name in p}
            p, state = ({name: pair[k] for name, pair in moved.items()} for k in (0, 1))
        x, y = self.queries
        with torch.no_grad():
            return vmap(lambda q: F.cross_entropy(functional_call(self.net, q, (x,)), y, reduction="none"))(p)

    def _moved(self, p, g, state, rate, step):
        first, second = state
        if not self.task.adamw:
            first = self.task.momentum * first + g + DECAY * p
            return p - rate * first, (first, second)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square()
        root = (second / (1 - 0.999**step)).sqrt() + EPSILON
        return p * (1 - rate * DECAY) - rate * first / (1 - 0.9**step) / root, (first, second)

    def _loss(self, p, x, y, weights):
        return (F.cross_entropy(functional_call(self.net, p, (x,)), y, reduction="none") * weights).sum() / len(x)

    def averaged(self, kept):
        """[model, query]: the mean over independent initial weights and orders."""
        total = 0.0
        for seed in range(SEEDS):
            torch.manual_seed(100 + seed)
            start = {n: p.detach().clone() for n, p in self.task.net().named_parameters()}
            draw = torch.Generator().manual_seed(50 + seed)
            epochs = [torch.randperm(len(self.train[0]), generator=draw).split(BATCH) for _ in range(self.task.epochs)]
            total = total + self.losses(kept, [ids for epoch in epochs for ids in epoch], start)
        return total / SEEDS


def fitted(setting, train, folder, seed):
    """One fit with the callback, and what it left behind."""
    pl.seed_everything(seed, verbose=False)
    module = Small(setting, setting.epochs * -(-len(train) // BATCH))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=setting.epochs,
        callbacks=[Influence(dirpath=folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, BATCH, shuffle=True))
    return module, Trajectory.load(folder)


def correlation(scores, kept, losses):
    """Mean over queries of the Spearman correlation; a higher score of what was kept predicts a lower loss."""
    predicted = -(kept @ scores.T)
    return float(np.mean([spearmanr(predicted[:, q], losses[:, q])[0] for q in range(scores.shape[0])]))


def one_run(setting, train, queries, seed, truth, half, averaged, rows):
    """{row: (fixed seed, averaged)} of one fit."""
    kept = (torch.rand(SUBSETS, len(train), generator=torch.Generator().manual_seed(seed + 7)) < setting.kept).float()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        module, trajectory = fitted(setting, train, Path(folder), seed)
        order = [torch.tensor(micro[0]) for micro in trajectory.steps["ids"].to_pylist()]
        start = {n.removeprefix("net."): p for n, p in trajectory.checkpoints[0].load().parameters.items()}
        fixed = truth.losses(kept, order, start)
        attributor = Attributor(module, train, trajectory)
        check(truth, attributor, queries, order, start)
        for row, candidates in rows.items():
            clock = time.perf_counter()
            scores = [attributor.score(method, queries).values for method in candidates]
            pairs = [(correlation(s, kept, fixed), correlation(s, half, averaged)) for s in scores]
            found[row] = [max(column) for column in zip(*pairs, strict=True)]
            print(
                f"    {row:52} {found[row][0]:6.3f} {found[row][1]:6.3f}   {time.perf_counter() - clock:6.1f} s",
                flush=True,
            )
    noise = torch.randn(len(queries), len(train), generator=torch.Generator().manual_seed(seed))
    found["random"] = [correlation(noise, kept, fixed), correlation(noise, half, averaged)]
    return found


def check(truth, attributor, queries, order, start):
    """Raises where the models trained at once do not repeat the Trainer's fit."""
    again = truth.losses(torch.ones(1, len(truth.train[0])), order, start)[0]
    torch.testing.assert_close(again.double(), attributor.losses(queries).values, rtol=1e-3, atol=1e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="an npz with x_test and y_test")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead, which need no file")
    parser.add_argument("--adamw", action="store_true", help="with --digits: trained by AdamW")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=list(SETTINGS), help="one of the two")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--dense", action="store_true", help="the dense GGN too, which repeats conjugate gradients")
    parser.add_argument("--quick", action="store_true", help="a few examples, once: does it run?")
    arguments = parser.parse_args()
    n, n_queries, runs = (100, 5, 1) if arguments.quick else (600, 40, arguments.runs)
    if arguments.adamw and not arguments.digits:
        parser.error("--adamw needs --digits")
    if not arguments.digits and not arguments.mnist:
        parser.error("pass --mnist FILE or --digits")
    if arguments.digits:
        settings = {ADAMW: ADAMW_TASK} if arguments.adamw else {DIGITS: DIGITS_TASK}
        train, queries = digits(n if arguments.quick else 1_000, n_queries)
    else:
        settings, (train, queries) = SETTINGS, images(arguments.mnist, n, n_queries)
    rows = {
        row: candidates
        for row, candidates in methods().items()
        if arguments.rows in row and (arguments.dense or row != DENSE)
    }
    for name, setting in settings.items():
        if arguments.only not in (None, name):
            continue
        print(f"\n{name}: {len(train)} examples, {n_queries} queries, {runs} runs")
        print(f"  fixed seed (keep {setting.kept:.0%}), averaged (keep 50 %)")
        truth = Truth(setting, train, queries)
        half = (torch.rand(SUBSETS, len(train), generator=torch.Generator().manual_seed(3)) < 0.5).float()
        averaged = truth.averaged(half)
        found = [one_run(setting, train, queries, seed, truth, half, averaged, rows) for seed in range(runs)]
        print(f"  means of {runs} runs")
        for row in found[0]:
            fixed, mean = (float(np.mean([run[row][k] for run in found])) for k in (0, 1))
            print(f"  {row:54} {fixed:6.2f} {mean:6.2f}", flush=True)


if __name__ == "__main__":
    main()
