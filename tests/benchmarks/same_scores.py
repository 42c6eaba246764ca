"""Proves that a refactoring changes no number: writes what every method answers on several small fits, and compares.

python tests/benchmarks/same_scores.py --write before.pt          (at one commit; PYTHONPATH chooses it)
python tests/benchmarks/same_scores.py --write after.pt           (at another)
python tests/benchmarks/same_scores.py --compare before.pt after.pt [--tolerance 'mlp/*=1e-6' ...]

Two runs at one commit write the same bits (one thread, fixed seeds, and a clock that ticks evenly: how many models are
trained side by side depends on it, and their last bits on that). `--compare` lists
every key that is missing on one side or differs in any bit, dtype or shape, with its relative difference, and then
raises. `--tolerance PATTERN=NUMBER` (fnmatch over keys) allows as much; `=inf` also allows other words.

With `--runs FOLDER` the fits stay in FOLDER, and a later call with it reads them instead of training: that what one
commit wrote still loads, and answers the same, at another. Give it a copy, since scoring adds files to a run.

Imports public names only, so that it runs unchanged at every commit since those names exist.
"""

import argparse
import fnmatch
import hashlib
import itertools
import logging
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_influence
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
    Scores,
    SelfScores,
    TracIn,
    TracInCP,
    TracInIdeal,
    Trajectory,
)
from lightning_influence.metrics import MislabelDetection, evaluate, subset_removal

GROUP = [1, 3, 5]
QUERIES = 5
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


# ---- subjects ---------------------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    """A network with its loss and its optimizer."""

    def __init__(self, net, optimizers, loss=F.cross_entropy):
        super().__init__()
        self.net, self.optimizers_of, self.loss = net, optimizers, loss

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizers_of(self)


class Transformer(nn.Module):
    """Embedding, learned positions, one encoder layer, a linear head on the mean over tokens."""

    def __init__(self, vocabulary=20, tokens=6, width=8, classes=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(tokens, width))
        self.encoder = nn.TransformerEncoderLayer(width, 2, 12, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens) + self.positions).mean(1))


class Recurrent(nn.Module):
    """Embedding, LSTM, a linear head on the last state."""

    def __init__(self, vocabulary=20, width=6, classes=3):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(vocabulary, width), nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


def mlp():
    net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Dropout(0.1), nn.Linear(10, 4))

    def optimizers(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]

    return Module(net, optimizers)


def cnn():
    # No bias in front of BatchNorm: its gradient is rounding alone, which Adam would blow up.
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
    )
    return Module(net, lambda module: torch.optim.Adam(module.parameters(), lr=0.01))


def text():
    def optimizers(module):
        head = [p for name, p in module.named_parameters() if "head" in name]
        body = [p for name, p in module.named_parameters() if "head" not in name]
        return torch.optim.AdamW([{"params": body}, {"params": head, "lr": 0.01}], lr=0.005, weight_decay=0.01)

    return Module(Transformer(), optimizers)


def recurrent():
    return Module(Recurrent(), lambda module: torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5, nesterov=True))


def logistic():
    def optimizers(module):
        groups = [{"params": [module.net.weight]}, {"params": [module.net.bias], "lr": 0.1, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, lr=0.3, momentum=0.5, weight_decay=0.01)

    return Module(nn.Linear(6, 3), optimizers).double()


def regression():
    def optimizers(module):
        return torch.optim.SGD(module.parameters(), lr=0.02, weight_decay=0.01)

    return Module(nn.Linear(4, 1), optimizers, F.mse_loss).double()


def per_sample(module, batch):
    """`loss=`: the loss of each example."""
    x, y = batch
    found = module.loss(module(x), y, reduction="none")
    return found if found.ndim == 1 else found.flatten(1).mean(1)


def margin(module, batch):
    """`measurement=`: the output of the label over the mean of all outputs, or the output itself."""
    outputs, y = module(batch[0]), batch[1]
    if y.is_floating_point():
        return outputs[:, 0]
    return outputs.gather(1, y[:, None])[:, 0] - outputs.mean(1)


def first_coordinates(module, batch):
    """`features=` of nearest neighbours."""
    return batch[0].flatten(1)[:, :4].double()


def numbers(n, shape, classes, dtype=torch.float32):
    """Training examples and queries with labels from a random linear teacher, a tenth of them at random."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(n + QUERIES, *shape, generator=draw, dtype=torch.float64)
    outputs = x.flatten(1) @ torch.randn(math.prod(shape), classes, generator=draw, dtype=torch.float64)
    if classes == 1:
        y = outputs + 0.5 * torch.randn(len(x), 1, generator=draw, dtype=torch.float64)
        return split(x.to(dtype), y.to(dtype))
    wrong = torch.rand(len(x), generator=draw) < 0.1
    y = torch.where(wrong, torch.randint(0, classes, (len(x),), generator=draw), outputs.argmax(1))
    return split(x.to(dtype), y)


def tokens(n):
    """Random sequences, labelled by their sum."""
    x = torch.randint(0, 20, (n + QUERIES, 6), generator=torch.Generator().manual_seed(3))
    return split(x, x.sum(1) % 3)


def split(x, y):
    return TensorDataset(x[:-QUERIES], y[:-QUERIES]), TensorDataset(x[-QUERIES:], y[-QUERIES:])


@dataclass(frozen=True)
class Subject:
    """How one small model is trained, and what it is asked.

    Args:
        module: makes the LightningModule.
        data: makes training examples and queries.
        batch: size of a batch.
        trainer: arguments of the Trainer.
        influence: arguments of the callback.
        during: methods that the callback runs, name -> method.
        light: only the cheap methods are asked.
        loss: as of `Attributor`.
        retrain: also ask methods that train models again.
    """

    module: Callable[[], pl.LightningModule]
    data: Callable[[], tuple[TensorDataset, TensorDataset]]
    batch: int
    trainer: dict[str, Any] = field(default_factory=dict)
    influence: dict[str, Any] = field(default_factory=dict)
    during: dict[str, Any] = field(default_factory=dict)
    light: bool = False
    loss: Any = None
    retrain: bool = True


DURING = {
    "HyDRA during fit": HyDRA(mode="during_fit"),
    "HyDRA during fit, some": HyDRA(mode="during_fit", examples=(0, 2, 5, 7)),
    "HyDRA during fit, no Hessian": HyDRA(mode="during_fit", hessian=False),
}
SOME = {name: DURING[name] for name in ("HyDRA during fit, some", "HyDRA during fit, no Hessian")}
SUBJECTS = {
    "mlp": Subject(
        mlp,
        lambda: numbers(90, (12,), 4),
        batch=16,
        trainer={"gradient_clip_val": 1.0},
        influence={"self_influence": True},
        during={"TracInCP": TracInCP(), "EK-FAC": InfluenceFunction(EKFAC()), **DURING},
    ),
    "cnn": Subject(
        cnn,
        lambda: numbers(48, (1, 8, 8), 3),
        batch=12,
        during={"TracInCP": TracInCP(), "RepresenterPoints": RepresenterPoints()},
    ),
    "cnn, loss=": Subject(
        cnn,
        lambda: numbers(32, (1, 8, 8), 3),
        batch=8,
        influence={"top_k": 4},
        during={"TracInCP": TracInCP(), **SOME},
        light=True,
        loss=per_sample,
    ),
    "text": Subject(text, lambda: tokens(48), batch=12, during={"GradientDot": GradientDot(), **SOME}),
    "recurrent": Subject(recurrent, lambda: tokens(40), batch=10, light=True, retrain=False),
    "logistic": Subject(
        logistic,
        lambda: numbers(40, (6,), 3, torch.float64),
        batch=9,
        trainer={"accumulate_grad_batches": 2},
        influence={"every_n_train_steps": 2},
        during=DURING,
    ),
    "regression": Subject(
        regression,
        lambda: numbers(20, (4,), 1, torch.float64),
        batch=1,
        influence={"self_influence": True},
        during={"TracInIdeal": TracInIdeal(), **DURING},
    ),
}


# ---- methods ----------------------------------------------------------------------------------------------------


def cheap():
    """Every kind of method once or twice."""
    plain = RandomProjection(8, structure="plain", entries="gaussian")
    return {
        "GradientDot": GradientDot(),
        "GradientDot, cosine": GradientDot(normalize="cosine"),
        "GradientDot, layerwise": GradientDot(normalize="layerwise"),
        "GradientDot, projection": GradientDot(projection=RandomProjection(8)),
        "GradientDot, plain projection": GradientDot(projection=plain),
        "TracInCP": TracInCP(),
        "TracInCP, cosine": TracInCP(normalize="cosine"),
        "TracIn": TracIn(),
        "HyDRA": HyDRA(checks=2),
        "HyDRA, no Hessian": HyDRA(hessian=False, checks=0),
        "HyDRA, runs": HyDRA(runs=2, checks=2),
        "EK-FAC": InfluenceFunction(EKFAC()),
        "SOURCE": SOURCE(segments=2),
        "RepresenterPoints": RepresenterPoints(),
        "KNNShapley": KNNShapley(k=3),
    }


def methods():
    """All of them, in several settings."""
    ggn = ExactGGN(damping=0.05)
    influence_functions = {
        "GGN": InfluenceFunction(ExactGGN()),
        "GGN, damping": InfluenceFunction(ggn),
        "GGN, renormalize": InfluenceFunction(ggn, removal="renormalize"),
        "GGN, newton": InfluenceFunction(ggn, correction="newton"),
        "GGN, newton, renormalize": InfluenceFunction(ggn, correction="newton", removal="renormalize"),
        "GGN, relatif": InfluenceFunction(ggn, normalize="relatif"),
        "GGN, relatif-loss": InfluenceFunction(ggn, normalize="relatif-loss"),
        "GGN, checkpoints": InfluenceFunction(ggn, checkpoints=(1, -1)),
        "Hessian": InfluenceFunction(ExactHessian()),
        "Hessian, damping": InfluenceFunction(ExactHessian(damping=1.0)),
        "Hessian, newton": InfluenceFunction(ExactHessian(damping=1.0), correction="newton"),
        "conjugate gradient": InfluenceFunction(ConjugateGradient(damping=0.05)),
        "conjugate gradient, Hessian": InfluenceFunction(ConjugateGradient(damping=1.0, matrix="hessian")),
        "conjugate gradient, relatif": InfluenceFunction(ConjugateGradient(damping=0.5), normalize="relatif"),
        "conjugate gradient, renormalize": InfluenceFunction(ConjugateGradient(damping=0.5), removal="renormalize"),
        "LiSSA": InfluenceFunction(LiSSA(damping=0.2)),
        "Arnoldi": InfluenceFunction(Arnoldi(steps=20)),
        "Arnoldi, drop": InfluenceFunction(Arnoldi(damping=0.05, steps=20, rank=8, complement="drop")),
        "EK-FAC, damping": InfluenceFunction(EKFAC(damping=0.05)),
        "EK-FAC, sampled": InfluenceFunction(EKFAC(labels="sampled", seed=1)),
        "EK-FAC, empirical": InfluenceFunction(EKFAC(labels="empirical")),
        "EK-FAC, exactly": InfluenceFunction(EKFAC(tolerance=0.0)),
        "EK-FAC, renormalize": InfluenceFunction(EKFAC(), removal="renormalize"),
        "EK-FAC, relatif": InfluenceFunction(EKFAC(), normalize="relatif"),
        "EK-FAC, relatif-loss": InfluenceFunction(EKFAC(), normalize="relatif-loss"),
        "EK-FAC, checkpoints": InfluenceFunction(EKFAC(), checkpoints=(1, -1)),
        "K-FAC": InfluenceFunction(EKFAC(corrected=False)),
    }
    return cheap() | {
        "TracInCP, paper": TracInCP(units="paper"),
        "TracInCP, layerwise": TracInCP(normalize="layerwise"),
        "TracInCP, projection": TracInCP(projection=RandomProjection(8, seed=1)),
        "TracInCP, checkpoints": TracInCP(checkpoints=(1, -1)),
        "TracIn, cosine": TracIn(normalize="cosine"),
        "TracIn, projection": TracIn(projection=RandomProjection(8)),
        "HyDRA, renormalize": HyDRA(removal="renormalize", checks=2),
        "HyDRA, some": HyDRA(examples=(0, 2, 5, 7), checks=0),
        "SOURCE, one segment": SOURCE(segments=1, curvature=EKFAC(labels="empirical")),
        "SOURCE, GGN": SOURCE(segments=2, curvature=ExactGGN()),
        "SOURCE, GGN, damping": SOURCE(segments=3, curvature=ggn),
        "RepresenterPoints, class": RepresenterPoints(of=1),
        "RepresenterPoints, label": RepresenterPoints(of="label", weight_decay=0.1),
        "RepresenterPoints, as trained": RepresenterPoints(refit=False),
        "RepresenterPoints, model": RepresenterPoints(target="model", max_iterations=20),
        "KNNShapley, features": KNNShapley(k=5, features=first_coordinates, labels=lambda batch: batch[1].flatten()),
        **{f"InfluenceFunction, {name}": method for name, method in influence_functions.items()},
    }


def retraining(n_train):
    """Those that train models again: few models, so that all of a call are trained together."""
    return {
        "LeaveOneOut": LeaveOneOut(examples=(0, 2, 5)),
        "Downsampling": Downsampling(n_models=8),
        "Downsampling, bernoulli": Downsampling(n_models=24, sampling="bernoulli", seed=1),
        "DataShapley": DataShapley(budget=2 * n_train, empty=1.0),
        "DataShapley, truncated": DataShapley(budget=n_train, tolerance=0.05, empty="initial", seed=1),
    }


# ---- asking -----------------------------------------------------------------------------------------------------


class Book:
    """What was answered, by key: tensors and words.

    Args:
        verbose: print what a question took.
    """

    def __init__(self, verbose=False):
        self.entries, self.verbose, self.errors = {}, verbose, {}

    def add(self, key, value):
        if key in self.entries:
            raise KeyError(f"Expected each key once, got {key!r} again.")
        if isinstance(value, (bool, int, float)):
            value = torch.tensor(value, dtype=torch.float64)
        self.entries[key] = value if isinstance(value, str) else value.detach().clone()

    def ask(self, key, question, keep):
        """Keeps the answer, or the kind of error that it was refused with (its words may change)."""
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            answer = question()
        except Exception as error:
            self.add(f"{key}/refused", type(error).__name__)
            self.errors[key] = "".join(traceback.format_exception(error)[-2:])
            return
        keep(key, answer)
        if self.verbose:
            print(f"{time.monotonic() - start:7.2f} s  {key}", file=sys.stderr, flush=True)

    def scores(self, key, scores):
        """A matrix, or the strongest of each query, and what travels along."""
        self.add(f"{key}/train_ids", scores.train_ids)
        try:
            self.add(f"{key}/values", scores.values)
        except Exception:  # with `top_k` there is no matrix
            self.add(f"{key}/few", "top_k")
        if isinstance(scores, Scores):
            self.add(f"{key}/query_ids", scores.query_ids)
            for side in ("proponents", "opponents") if "measured" in key or "top" in key else ():
                best = getattr(scores, side)(3)
                self.add(f"{key}/{side}", best.scores)
                self.add(f"{key}/{side} ids", best.train_ids)
        self.add(f"{key}/units", scores.units)
        self.add(f"{key}/notes", len(scores.notes))
        self.add(f"{key}/checkpoints", torch.tensor(scores.checkpoints))
        for name, figure in scores.figures.items():
            self.add(f"{key}/figures/{name}", figure)

    def every_way(self, key, attributor, method, queries, group=True):
        """Scores, self-influence and a group."""
        self.ask(f"{key}/score", lambda: attributor.score(method, queries), self.scores)
        self.ask(f"{key}/self", lambda: attributor.self_influence(method), self.scores)
        if group:
            chosen = [0, 2, 5] if getattr(method, "examples", None) else GROUP
            self.ask(f"{key}/group", lambda: attributor.group(method, chosen, queries), self.add)


def trained(name, subject, folder):
    """Fits where FOLDER has no run yet; returns a module with the final weights, the data, and the trajectory."""
    torch.manual_seed(0)
    module, (train, queries) = subject.module(), subject.data()
    loader = DataLoader(train, subject.batch, shuffle=True)
    if not (folder / "run-0").exists():
        influence = Influence(
            subject.during,
            queries=queries,
            dirpath=folder,
            loss=subject.loss,
            max_cost=1e9,
            **subject.influence,
        )
        kept = ModelCheckpoint(folder / "ckpt", filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        torch.manual_seed(1)
        pl.Trainer(max_epochs=3, callbacks=[influence, kept], **QUIET, **subject.trainer).fit(module, loader)
        module = subject.module()
    trajectory = Trajectory.load(folder)
    state = trajectory.checkpoints[-1].load()
    module.load_state_dict({**state.parameters, **state.buffers})
    return module, loader, queries, trajectory


def record_run(book, name, trajectory):
    """What the fit left on disk: weights, batch order, learning rates, and what the callback scored."""
    for checkpoint in trajectory.checkpoints:
        digest, state = hashlib.sha256(), checkpoint.load()
        for part in (state.parameters, state.buffers):
            for key in sorted(part):
                digest.update(part[key].contiguous().numpy().tobytes())
        book.add(f"{name}/weights/step {checkpoint.step}", digest.hexdigest())
    for column in ("ids", "lr"):
        book.add(f"{name}/steps/{column}", repr(trajectory.steps[column].to_pylist()))
    book.add(f"{name}/trajectory notes", len(trajectory.notes))
    for path in sorted((trajectory.path / "scores").glob("*.arrow")):
        kind = SelfScores if path.stem.endswith(".self") else Scores
        book.ask(f"{name}/at the end of the fit/{path.stem}", lambda path=path, kind=kind: kind.load(path), book.scores)


def record_variants(book, name, attributor, queries):
    """Questions other than that for the loss of each query."""
    asked = {
        "mean": {"aggregate": "mean"},
        "top": {"top_k": 4},
        "measured": {"measurement": margin, "higher_is_better": True},
        "measured, mean": {"measurement": margin, "aggregate": "mean"},
    }
    for label, method in cheap().items():
        for how, options in asked.items():
            book.ask(
                f"{name}/{label}/{how}",
                lambda method=method, options=options: attributor.score(method, queries, **options),
                book.scores,
            )


def record_setups(book, name, subject, module, loader, queries, trajectory):
    """Attributors with other arguments."""
    train = loader.dataset
    last = [n for n, _ in module.named_parameters()][-1].rpartition(".")[0] + ".*"
    setups = {
        "Dataset, batch_size": lambda: Attributor(module, train, trajectory, batch_size=7, loss=subject.loss),
        "parameters": lambda: Attributor(module, loader, trajectory, parameters=last, loss=subject.loss),
        "loss": lambda: Attributor(module, loader, trajectory, loss=per_sample),
        "no trajectory": lambda: Attributor(module, train, loss=subject.loss),
        "ckpt files": lambda: Attributor(module, train, ckpt_files(trajectory), loss=subject.loss),
    }
    few = ("TracInCP", "TracIn", "HyDRA", "EK-FAC", "RepresenterPoints", "InfluenceFunction, GGN, newton")
    for setup, make in setups.items():
        for label in few:
            method = methods()[label]
            book.ask(
                f"{name}/{setup}/{label}", lambda make=make, method=method: make().score(method, queries), book.scores
            )


def ckpt_files(trajectory):
    return Trajectory.from_checkpoints(sorted((trajectory.path.parent / "ckpt").glob("*.ckpt")))


def record_retraining(book, name, subject, module, loader, queries, trajectory):
    """Methods that train models again, and the metrics that judge by such models."""
    for removal in ("downweight", "renormalize"):
        refit = Refit(removal=removal, dirpath=trajectory.path / f"same-{removal}")
        attributor = Attributor(module, loader, trajectory, refit=refit, loss=subject.loss)
        for label, method in retraining(len(loader.dataset)).items():
            if not label.startswith("DataShapley") or len(loader.dataset) <= 40:
                book.every_way(f"{name}/{removal}/{label}", attributor, method, queries)
        method = Downsampling(n_models=8)
        book.ask(
            f"{name}/{removal}/estimate",
            lambda attributor=attributor, method=method: attributor.estimate(method, queries).standard_errors,
            book.add,
        )
        book.ask(f"{name}/{removal}/losses", attributor.losses, book.add)
        judged(book, f"{name}/{removal}", attributor, refit, queries)


def record_independent(book, name, subject, module, loader, queries, folder):
    """Models from seeds of their own."""

    def trainer():
        return pl.Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)

    refit = Refit(
        subject.module,
        trainer,
        lambda data: DataLoader(data, subject.batch, shuffle=True),
        seeds="independent",
        dirpath=folder / "independent",
        n_jobs=1,
    )
    attributor = Attributor(module, loader, refit=refit)
    book.every_way(f"{name}/independent/Downsampling", attributor, Downsampling(n_models=12), queries)


def judged(book, key, attributor, refit, queries):
    """What the metrics say of some scores."""
    banks = {"subsets": {"n_subsets": 8}, "leave-one-out": {"leave_out": [0, 1, 2, 3, 4, 5]}}
    for label in ("TracInCP", "HyDRA"):
        try:
            scores = attributor.score(cheap()[label], queries)
        except Exception:  # refused above too
            continue
        for bank_name, options in banks.items():

            def keep(key, bank, scores=scores):
                book.add(f"{key}/losses", bank.losses)
                wrong = torch.arange(len(scores.train_ids)) % 10 == 0
                found = evaluate(scores, bank, mislabelled=wrong)
                for column, metrics in {"scores": found.metrics, **found.baselines}.items():
                    for name, figure in metrics.items():
                        book.add(f"{key}/{column}/{name}", figure)
                book.add(f"{key}/ceiling", found.ceiling)

            book.ask(f"{key}/{label}/{bank_name}", lambda options=options: refit.bank(queries, **options), keep)

        def keep_metric(key, metric):
            for name, figure in metric.compute().items():
                book.add(f"{key}/{name}", figure)

        book.ask(f"{key}/{label}/removal", lambda scores=scores: subset_removal(scores, refit, 3, queries), keep_metric)
        metric = MislabelDetection()
        metric.update(scores.values.double().mean(0), torch.arange(len(scores.train_ids)) % 10 == 0)
        keep_metric(f"{key}/{label}/mislabelled", metric)


def record(book, name, subject, folder):
    """Everything about one subject."""
    module, loader, queries, trajectory = trained(name, subject, folder)
    record_run(book, name, trajectory)
    attributor = Attributor(module, train=loader, trajectory=trajectory, loss=subject.loss)
    for label, method in (cheap() if subject.light else methods()).items():
        book.every_way(f"{name}/{label}", attributor, method, queries)
    for label, method in subject.during.items():
        if label not in cheap():
            book.every_way(f"{name}/{label}", attributor, method, queries)
    record_variants(book, name, attributor, queries)
    record_setups(book, name, subject, module, loader, queries, trajectory)
    if subject.retrain:
        record_retraining(book, name, subject, module, loader, queries, trajectory)
    if name == "logistic":
        record_independent(book, name, subject, module, loader, queries, folder)


def write(path, runs, only, verbose):
    """Asks everything, and writes the answers."""
    torch.set_num_threads(1)
    ticks = itertools.count()
    time.perf_counter = lambda: 1e-4 * next(ticks)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_influence"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"{lightning_influence.__file__}, torch {torch.__version__}")
    book, start = Book(verbose), time.monotonic()
    for name in only or SUBJECTS:
        began = time.monotonic()
        record(book, name, SUBJECTS[name], runs / name.replace(", ", "-").replace("=", ""))
        print(f"{name:12} {time.monotonic() - began:6.1f} s", flush=True)
    refused = sum(key.endswith("/refused") for key in book.entries)
    print(f"{len(book.entries):,} entries ({refused} refusals) in {time.monotonic() - start:.0f} s")
    if verbose:
        for key, error in book.errors.items():
            print(f"{key}\n{error}", file=sys.stderr)
    torch.save(book.entries, path)


# ---- comparing --------------------------------------------------------------------------------------------------


class DifferentError(Exception):
    """Answers of two commits that differ."""


def bits(tensor):
    return tensor.contiguous().numpy().tobytes()


def relative(a, b):
    """Largest difference in units of the largest entry; infinite where no number says it."""
    if isinstance(a, str) or isinstance(b, str) or a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    a, b = a.double(), b.double()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        return math.inf
    finite = a.isfinite()
    if not torch.equal(a[a.isinf()], b[b.isinf()]):
        return math.inf
    apart = (a - b)[finite].abs()
    largest = float(a[finite].abs().max()) if len(apart) else 0.0
    worst = float(apart.max()) if len(apart) else 0.0
    return worst / largest if largest > 0 else (0.0 if worst == 0 else math.inf)


def same(a, b):
    if isinstance(a, str) or isinstance(b, str):
        return type(a) is type(b) and a == b
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def shown(value):
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def differences(first, second, tolerances):
    """A line for each key that is missing on one side or differs by more than is allowed.

    Args:
        first: key -> tensor or words.
        second: likewise.
        tolerances: pattern -> the largest relative difference.
    """
    lines = [f"only in the first: {key}" for key in first if key not in second]
    lines += [f"only in the second: {key}" for key in second if key not in first]
    for key in first:
        if key not in second or same(first[key], second[key]):
            continue
        apart = relative(first[key], second[key])
        allowed = max((t for pattern, t in tolerances.items() if fnmatch.fnmatchcase(key, pattern)), default=-1.0)
        if apart <= allowed:
            continue
        values = "" if math.isfinite(apart) else f": {shown(first[key])} and {shown(second[key])}"
        lines.append(f"{apart:9.2e}  {key}{values}")
    return lines


def compare(paths, tolerances):
    """Raises DifferentError with every difference."""
    first, second = (torch.load(path, weights_only=True) for path in paths)
    lines = differences(first, second, tolerances)
    if lines:
        raise DifferentError(f"{len(lines)} of {len(first | second):,} keys differ:\n" + "\n".join(lines))
    identical = sum(same(first[key], second[key]) for key in first)
    print(f"{identical:,} of {len(first):,} entries are bit-identical, the others within tolerance.")


def tolerance(text):
    pattern, _, number = text.rpartition("=")
    return pattern, float(number)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="FILE", help="ask every method and write the answers")
    parser.add_argument("--compare", nargs=2, metavar="FILE", help="two files written before")
    parser.add_argument("--tolerance", action="append", type=tolerance, default=[], metavar="PATTERN=NUMBER")
    parser.add_argument("--runs", type=Path, help="folder where fits stay, or are read from; none: a temporary one")
    parser.add_argument("--only", action="append", choices=list(SUBJECTS), help="this subject; may be repeated")
    parser.add_argument("--verbose", action="store_true", help="seconds of every question, and the refusals")
    arguments = parser.parse_args()
    if arguments.write:
        with tempfile.TemporaryDirectory() as folder:
            write(arguments.write, arguments.runs or Path(folder), arguments.only, arguments.verbose)
    if arguments.compare:
        try:
            compare(arguments.compare, dict(arguments.tolerance))
        except DifferentError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
