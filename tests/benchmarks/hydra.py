"""How well HyDRA by replay predicts a fit under other weights of its examples, and what it costs beside the fit.

python tests/benchmarks/hydra.py --mnist mnist.npz [--runs 3] [--rough]

600 digits of 14 x 14 pixels, MLP 196-32-10, batches of 50, 10 epochs; 40 queries. Fixed-seed linear datamodeling score
(Spearman over 100 random subsets, mean over queries), Pearson correlation and slope of scores with exact leave-one-out
of 200 examples, seconds. ``--rough``: GELU and momentum 0.9, where the fit is not smooth. ``--cnn``: what 10 queries
cost on a CNN of 225,000 parameters, 2,000 digits of 28 x 28 pixels.
"""

import argparse
import statistics
import tempfile
import time

import pytorch_lightning as pl
import torch
from subjects import QUIET, Classifier, cnn, halved, images
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import HyDRA, Influence, TracInCP
from lightning_influence.replay.replay import Replay
from lightning_influence.replay.vectorized import run_many

EPOCHS, BATCH, TRAIN, QUERIES = 10, 50, 600, 40
FLOORS = {"keep 90 %": 0.95, "keep 99 %": 0.90, "leave-one-out": 0.90}
# Seconds of all 40 queries, of the adjoint written out by hand: what it takes at most.
CEILING = 1.5
# Times the fit, of each of 10 queries on the CNN.
CNN_CEILING = 2.0


class Small(Classifier):
    """The MLP with its optimizer."""

    def __init__(self, rough):
        act = nn.GELU() if rough else nn.ReLU()
        options = {"lr": 0.05, "momentum": 0.9} if rough else {"lr": 0.1}
        net = nn.Sequential(nn.Flatten(), nn.Linear(196, 32), act, nn.Linear(32, 10))
        super().__init__(net, weight_decay=1e-3, **options)


def digits(path):
    x, y = halved(path)
    train = TensorDataset(x[:TRAIN], y[:TRAIN])
    return train, TensorDataset(x[9000 : 9000 + QUERIES], y[9000 : 9000 + QUERIES])


def fit(train, seed, rough, *callbacks):
    torch.manual_seed(seed)
    module = Small(rough)
    trainer = pl.Trainer(**QUIET, devices=1, max_epochs=EPOCHS, callbacks=list(callbacks))
    started = time.perf_counter()
    trainer.fit(module, DataLoader(train, BATCH, shuffle=True))
    return module, trainer, time.perf_counter() - started


def ranks(values):
    return values.argsort(0).argsort(0).double()


def correlation(a, b):
    a, b = a - a.mean(0), b - b.mean(0)
    return float(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean())


def losses(module, weights, queries):
    x, y = queries.tensors

    def of_one(parameters):
        return F.cross_entropy(torch.func.functional_call(module, parameters, (x,)), y, reduction="none")

    with torch.no_grad():
        return torch.func.vmap(of_one)(weights).double()


def by_hand(module, train, queries, options):
    """Seconds that ``torch.func`` takes to walk one fit back for all queries: no replay, no check, no record."""
    lr, momentum = options["lr"], options.get("momentum", 0.0)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    (x, y), (far, label) = train.tensors, queries.tensors

    def loss(p, x, y):
        return F.cross_entropy(torch.func.functional_call(module, p, (x,)), y)

    def step(p, v, x, y):
        gradients = torch.func.grad(loss)(p, x, y)
        v = {n: momentum * v[n] + gradients[n] + 1e-3 * p[n] for n in p}
        return {n: p[n] - lr * v[n] for n in p}, v

    def back(by_p, by_v, p, v, x, y):
        return torch.func.vjp(lambda p, v: step(p, v, x, y), p, v)[1]((by_p, by_v))

    backs = torch.func.vmap(back, (0, 0, None, None, None, None))
    by_p = torch.func.vmap(lambda q, c: torch.func.grad(loss)(weights, q[None], c[None]))(far, label)
    by_v = {n: torch.zeros_like(g) for n, g in by_p.items()}
    velocity = {n: torch.zeros_like(p) for n, p in weights.items()}
    started = time.perf_counter()
    for ids in torch.arange(TRAIN).split(BATCH) * EPOCHS:
        by_p, by_v = backs(by_p, by_v, weights, velocity, x[ids], y[ids])
    return time.perf_counter() - started


def products(train):
    """Seconds of the two largest matrix products of every step's Hessian with 40 vectors, and of nothing else."""
    x, directions = train.tensors[0][:BATCH].flatten(1), torch.randn(QUERIES * 32, 196)
    started = time.perf_counter()
    for _ in range(EPOCHS * TRAIN // BATCH):
        (x @ directions.T).T @ x
    return time.perf_counter() - started


def measure(train, queries, seed, rough, means_of):
    fit(train, seed, rough)  # warms up
    _, _, plain = fit(train, seed, rough)
    with tempfile.TemporaryDirectory() as folder:
        influence = Influence(dirpath=folder)
        module, _, _ = fit(train, seed, rough, influence)
        attributor, found, seconds = influence.attributor, {}, {}
        methods = {"exact": HyDRA(), "no checks": HyDRA(checks=0), "fast": HyDRA(hessian=False)}
        attributor.score(methods["no checks"], queries)  # warms up
        if means_of:
            methods[f"mean of {means_of}"] = HyDRA(runs=means_of)
        for name, method in (methods | {"TracInCP": TracInCP()}).items():
            started = time.perf_counter()
            found[name] = attributor.score(method, queries)
            seconds[name] = time.perf_counter() - started
        draw = torch.Generator().manual_seed(7)
        subsets = {f"keep {k} %": (torch.rand(100, TRAIN, generator=draw) < k / 100).float() for k in (50, 90, 99)}
        alone = torch.ones(201, TRAIN)
        alone[range(200), range(200)] = 0.0
        with attributor.session() as session:
            replay = Replay(session.engine, session.examples, influence.trajectory)
            started = time.perf_counter()
            truth = {name: losses(module, run_many(replay, w), queries) for name, w in subsets.items()}
            seconds["a model"] = (time.perf_counter() - started) / 300
            ends = losses(module, run_many(replay, alone), queries)
    seconds["by hand"] = min(by_hand(module, train, queries, module.options) for _ in range(2))
    seconds["products alone"] = min(products(train) for _ in range(3))
    changes = ends[:200] - ends[200]
    table = {}
    for name, scores in found.items():
        values = scores.values.double()
        row = {k: correlation(ranks(-(w.double() @ values.T)), ranks(truth[k])) for k, w in subsets.items()}
        row["leave-one-out"] = correlation(values[:, :200].T, changes)
        predicted = values[:, :200].flatten()
        row["slope"] = float((predicted * changes.T.flatten()).sum() / predicted.square().sum())
        table[name] = row
    return table, seconds, plain, {name: round(s.figures.get("agreement", torch.nan), 2) for name, s in found.items()}


def cost_on_cnn(path):
    train, queries = images(path, 2_000, 10)

    def fit(*callbacks):
        torch.manual_seed(0)
        module = Classifier(cnn())
        started = time.perf_counter()
        pl.Trainer(**QUIET, max_epochs=2, callbacks=list(callbacks)).fit(module, DataLoader(train, 256, shuffle=True))
        return time.perf_counter() - started

    fit()  # warms up
    with tempfile.TemporaryDirectory() as folder:
        influence = Influence(dirpath=folder)
        fit(influence)
        plain = statistics.median(fit() for _ in range(3))
        started = time.perf_counter()
        influence.attributor.score(HyDRA(checks=0), queries)
        seconds = time.perf_counter() - started
    share = seconds / len(queries) / plain
    print(
        f"CNN: fit {plain:.2f} s, 10 queries {seconds:.2f} s, {share:.2f} x the fit for each (at most {CNN_CEILING:g})"
    )
    assert share <= CNN_CEILING, f"Expected at most {CNN_CEILING} of a fit for each query, got {share:.2f}."


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rough", action="store_true")
    parser.add_argument("--cnn", action="store_true")
    parser.add_argument("--means-of", type=int, default=0, help="HyDRA as the mean of so many runs as well")
    asked = parser.parse_args()
    if asked.cnn:
        cost_on_cnn(asked.mnist)
        return
    train, queries = digits(asked.mnist)
    runs = [measure(train, queries, seed, asked.rough, asked.means_of) for seed in range(asked.runs)]
    means = {
        method: {k: sum(table[method][k] for table, *_ in runs) / len(runs) for k in row}
        for method, row in runs[0][0].items()
    }
    for method, row in means.items():
        print(f"{method:18s}", "  ".join(f"{k} {v:+.3f}" for k, v in row.items()))
    for _, seconds, plain, figures in runs:
        shares = {k: f"{s:.3f} s" for k, s in seconds.items()}
        share = seconds["no checks"] / QUERIES / plain
        print(f"fit {plain:.2f} s, {shares}, exact / query / fit {share:.4f}, {figures}")
    if not asked.rough:
        wrong = {k: means["exact"][k] for k, floor in FLOORS.items() if not means["exact"][k] >= floor}
        worst = min(s["no checks"] / s["by hand"] for _, s, *_ in runs)
        assert not wrong, f"Expected at least {FLOORS}, got {wrong}."
        assert worst <= CEILING, f"Expected at most {CEILING} of the time by hand, got {worst:.3f}."


if __name__ == "__main__":
    main()
