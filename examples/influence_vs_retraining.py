"""Which estimate of influence is closest to training again?

Scikit-learn's digits, a tenth of the training labels flipped, a small network. Every method scores the same queries,
and its scores are compared with models that were trained again on random parts of the data:

    python examples/influence_vs_retraining.py           # under three minutes on two cores
    python examples/influence_vs_retraining.py --quick   # seconds

*Fixed*: the captured run once more, each time without a tenth of the examples. *Averaged*: models on halves of the
data, several seeds for each. Leave-one-out shows whether the size of the scores is right (slope 1), and the last column
how well they find the wrong labels.
"""

import argparse
import inspect
import time
import warnings
from dataclasses import is_dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_influence
from lightning_influence import Attributor, Evidence, Influence, Method, Refit, TracInCP
from lightning_influence.metrics import evaluate

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Classifier(pl.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def noisy_digits(n_train, n_queries):
    """Training data with flipped labels, clean queries, and a mask of the flipped labels."""
    digits, generator = load_digits(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    true = torch.tensor(digits.target)[order]
    flipped = torch.rand(n_train, generator=generator) < 0.1
    labels = true.clone()
    labels[:n_train][flipped] = (true[:n_train][flipped] + torch.randint(1, 10, (int(flipped.sum()),))) % 10
    queries = slice(n_train, n_train + n_queries)
    train = TensorDataset(images[:n_train], labels[:n_train])
    return train, TensorDataset(images[queries], true[queries]), flipped


def loader(subset):
    return DataLoader(subset, batch_size=50, shuffle=True)


def captured(train, queries, epochs, methods, out):
    """Train as usual with one more callback; some methods follow the fit while it runs."""
    torch.manual_seed(0)
    watching = {name: method for name, method in methods.items() if method.needs & Evidence.TRACKER}
    model, influence = Classifier(), Influence(watching, queries=queries, dirpath=out, max_cost=1e6)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[influence], **QUIET)
    trainer.fit(model, loader(train))
    return model, trainer, influence


def all_methods(budget):
    """Every method of the package, ready to use."""
    found = {}
    for name in lightning_influence.__all__:
        kind = getattr(lightning_influence, name)
        if not (inspect.isclass(kind) and issubclass(kind, Method) and is_dataclass(kind)):
            continue
        if name not in ("LeaveOneOut", "TracInIdeal"):  # the truth itself, and a method for batches of one
            found |= variants(name, kind, budget)
    return found


def variants(name, kind, budget):
    """A method with the hyper-parameters that the table compares."""
    if name == "InfluenceFunction":
        curvatures = ("ExactGGN", "EKFAC")
        return {f"influence function, {c}": kind(getattr(lightning_influence, c)()) for c in curvatures}
    if name == "TracInCP":
        return {"TracInCP": kind(), "TracInCP, cosine (GAS)": kind(normalize="cosine")}
    if name == "HyDRA":
        return {"HyDRA without Hessian": kind(hessian=False), "HyDRA": kind(hessian=True)}
    if name in ("Downsampling", "DataShapley"):
        return {f"{name}, {budget} models": kind(**{"n_models" if name == "Downsampling" else "budget": budget})}
    return {name: kind()}


def evaluated(name, method, attributor, queries, banks, flipped, watched):
    """A row of the table: quality by column, and seconds."""
    start = time.perf_counter()
    scores = watched[name] if name in watched else attributor.score(method, queries)
    row = {"seconds": float("nan") if name in watched else time.perf_counter() - start}
    for column, bank in banks.items():
        metrics = evaluate(scores, bank, mislabelled=flipped).metrics
        if "lds" in metrics:
            row[column] = metrics["lds"]
        else:
            row |= {"leave-one-out": metrics["pearson"], "slope": metrics["slope"]}
        row["wrong labels"] = metrics["auroc"]
    if not scores.units.startswith(("loss", "query loss")):
        row["slope"] = float("nan")
    print(line(name, row), flush=True)
    return row


def line(name, row):
    cells = [f"{row[column]:>14.2f}" if row[column] == row[column] else f"{'-':>14}" for column in COLUMNS]
    seconds = "(in fit)" if row["seconds"] != row["seconds"] else f"{row['seconds']:.1f}"
    return f"  {name:32}" + "".join(cells) + f"{seconds:>9}"


COLUMNS = ("fixed", "averaged", "leave-one-out", "slope", "wrong labels")


def draw(rows, ceilings, path):
    """Bars of both linear datamodeling scores, best on top."""
    from matplotlib.figure import Figure

    names = sorted(rows, key=lambda name: rows[name]["averaged"])
    figure = Figure(figsize=(7.5, 1.2 + 0.32 * len(names)), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, column, colour in zip(axes, ("fixed", "averaged"), ("#1b7f5c", "#3b6fb6"), strict=True):
        ax.barh(names, [rows[name][column] for name in names], color=colour)
        ax.axvline(ceilings[column], color="black", linewidth=0.8, linestyle=":")
        ax.set_title({"fixed": "this run", "averaged": "halves, averaged over seeds"}[column], fontsize=10)
        ax.set_xlabel("linear datamodeling score (dotted: noise ceiling)", fontsize=8)
        ax.set_xlim(min(0.0, *(rows[name][column] for name in names)) - 0.02, 1.02)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less data, fewer models")
    parser.add_argument("--out", default="influence_vs_retraining_output", help="where to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the network is tiny: more threads only wait for one another
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    quick = arguments.quick
    n_train, n_queries, epochs, n_subsets, n_seeds = (150, 8, 3, 20, 2) if quick else (600, 40, 10, 60, 3)

    out = Path(arguments.out)
    train, queries, flipped = noisy_digits(n_train, n_queries)
    methods = all_methods(budget=n_train)
    model, trainer, influence = captured(train, queries, epochs, methods, out / "run")

    fixed, trajectory = Refit(), influence.attributor.trajectory
    attributor = Attributor(model, train=train, trajectory=trajectory, trainer=trainer, refit=fixed)
    start = time.perf_counter()
    banks = {
        "fixed": fixed.bank(queries, n_subsets=n_subsets, fraction=0.9),
        "left out": fixed.bank(queries, leave_out=range(0, n_train, 10)),
    }
    print(f"Trained {len(fixed.models.store)} models by replaying the run in {time.perf_counter() - start:.1f} s.")
    start = time.perf_counter()
    banks["averaged"] = averaged(model, train, queries, epochs, out, n_subsets // 2, n_seeds)
    models = banks["averaged"].losses[..., 0].numel()
    print(f"Trained {models} models with seeds of their own in {time.perf_counter() - start:.1f} s.\n")

    print(f"  {'':32}" + "".join(f"{column:>14}" for column in COLUMNS) + f"{'seconds':>9}")
    watched = influence.scores
    rows = {name: evaluated(name, m, attributor, queries, banks, flipped, watched) for name, m in methods.items()}
    verdict = evaluate(attributor.score(TracInCP(), queries), banks["averaged"], mislabelled=flipped)
    baselines = verdict.baselines
    random = baselines["random"]["lds"]
    print(f"\n  Noise ceiling: 1.00 fixed, {verdict.ceiling:.2f} averaged; random scores reach {random:.2f}.")
    print(
        f"  The plain loss finds wrong labels with an area under the curve of {baselines['plain loss']['auroc']:.2f}."
    )
    draw(rows, {"fixed": 1.0, "averaged": verdict.ceiling}, out / "table.png")
    print(f"\nWritten: {out / 'table.png'}; the models are kept in {out}: a second call trains none.")
    check(rows)


def averaged(model, train, queries, epochs, out, n_subsets, n_seeds):
    """A bank of models trained on halves of the data, by the user's own Trainer, with several seeds for each half."""

    def trainer():
        return pl.Trainer(max_epochs=epochs, **QUIET)

    refit = Refit(Classifier, trainer, loader, seeds="independent", dirpath=out / "independent")
    Attributor(model, train=train, refit=refit)
    return refit.bank(queries, n_subsets=n_subsets, fraction=0.5, n_seeds=n_seeds)


def check(rows):
    """Assert what this example claims."""
    for name in ("TracInCP", "GradientDot"):
        assert rows[name]["fixed"] > 0.1, f"Expected `{name}` to beat random on this run, got {rows[name]}."
    if "HyDRA" in rows:
        best = max(rows, key=lambda name: rows[name]["fixed"])
        assert rows["HyDRA"]["fixed"] > rows["TracInCP"]["fixed"], f"Expected `HyDRA` above TracInCP, got {best}."


if __name__ == "__main__":
    main()
