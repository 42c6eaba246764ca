"""Precision of every list of suspect labels on human label noise (CIFAR-10N), with the CPU seconds each takes.

pip install cleanlab  # otherwise its rows are left out
python tests/benchmarks/labels.py --images cifar10_10k2k.npz --labels cifar10n.npz [--seeds 3] [--epochs 8]

5,000 images with the labels of people, of which 9 % (aggregate) or 40 % (worse) are wrong; a small CNN, one fit with
eight checkpoints per seed, from which all lists are read. Held-out images, labelled by the same people, serve the lists
that need queries. Precision at 1, 5, 10 % after 8 epochs, means of 3 seeds, with CPU seconds:

                                              aggregate         worse             seconds
    mean loss over checkpoints (labels=True)  0.64, 0.46, 0.35  0.99, 0.92, 0.87      6.6
    loss at the end                           0.61, 0.45, 0.35  0.97, 0.92, 0.85      0.9
    cleanlab, self-confidence, cross-valid.   0.48, 0.37, 0.31  0.86, 0.87, 0.81     24
    cleanlab, normalized margin, cross-valid. 0.24, 0.21, 0.19  0.73, 0.71, 0.69     24
    KNNShapley, harm to training data         0.50, 0.38, 0.32  0.91, 0.86, 0.83      4.6
    KNNShapley, harm to held-out data         0.40, 0.30, 0.26  0.84, 0.76, 0.72      1.0
    RepresenterPoints, self-influence         0.35, 0.26, 0.23  0.89, 0.76, 0.70      1.0
    TracInCP, self-influence                  0.19, 0.17, 0.17  0.75, 0.70, 0.65     16
    GradientDot, self-influence               0.20, 0.17, 0.17  0.71, 0.64, 0.62      2.1
    EK-FAC, self-influence                    0.20, 0.18, 0.17  0.70, 0.66, 0.64     72
    TracInCP, harm to held-out data           0.31, 0.28, 0.21  0.70, 0.58, 0.53     19
    EK-FAC, harm to held-out data             0.24, 0.20, 0.17  0.79, 0.62, 0.58     70 (3 with stored factors)
    GAS, harm to held-out data                0.21, 0.18, 0.18  0.56, 0.51, 0.49     26
    random order                              0.14, 0.10, 0.10  0.47, 0.41, 0.42      0

The mean loss is far better than that at the end once the fit knows 97 % of the labels by heart (40 epochs; 0.56, 0.39,
0.32 and 0.12, 0.18, 0.19 with aggregate labels). The mean probability of the label is about as good, but is defined
for classifiers only.

SOURCE's self-influence was not waited for: after three segments' factors (10 minutes on busy cores), a fifteenth of the
scores were there and two hours to go for one seed; `--without SOURCE` leaves it out. Rows with (by hand) are not the
library's; those with (cross-validation) train three more models.
"""

import argparse
import logging
import tempfile
import time
import warnings

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_influence import (
    EKFAC,
    SOURCE,
    GradientDot,
    Influence,
    InfluenceFunction,
    KNNShapley,
    RepresenterPoints,
    TracInCP,
)

TRAIN, HELD_OUT, FOLDS, CHECKPOINTS = 5000, 500, 3, 8
FRACTIONS = (0.01, 0.05, 0.10)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def noisy(images, labels, noise, seed):
    """Training and held-out images with people's labels, and which training labels are wrong."""
    with np.load(images) as arrays, np.load(labels) as people:
        order = np.random.default_rng(seed).permutation(len(arrays["x_train"]))[: TRAIN + HELD_OUT]
        x = torch.tensor(arrays["x_train"][order]).float().permute(0, 3, 1, 2).contiguous() / 255 - 0.5
        given = torch.tensor(people[f"{noise}_label"][arrays["idx_train"][order]]).long()
        true = torch.tensor(arrays["y_train"][order]).long()
    data = TensorDataset(x * 4, given)
    held = Subset(data, range(TRAIN, TRAIN + HELD_OUT))
    return TensorDataset(data.tensors[0][:TRAIN], given[:TRAIN]), held, (given != true)[:TRAIN]


def fit(train, seed, epochs, folder=None):
    """A fit, and the callback that recorded it."""
    pl.seed_everything(seed, verbose=False)
    module = Classifier()
    callbacks = [] if folder is None else [Influence(dirpath=folder, every_n_epochs=max(1, epochs // CHECKPOINTS))]
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)
    trainer.fit(module, DataLoader(train, 64, shuffle=True))
    return module, *callbacks


@torch.no_grad()
def logits_of(module, data):
    """[example, class]."""
    return torch.cat([module.eval()(x) for x, _ in DataLoader(data, 500)])


def out_of_sample(train, seed, epochs):
    """Logits of each example by a model that was trained without its third of the data."""
    logits, folds = torch.empty(TRAIN, 10), torch.randperm(TRAIN, generator=torch.Generator().manual_seed(seed)) % FOLDS
    for fold in range(FOLDS):
        inside, outside = (folds != fold).nonzero()[:, 0].tolist(), (folds == fold).nonzero()[:, 0].tolist()
        logits[outside] = logits_of(fit(Subset(train, inside), seed, epochs)[0], Subset(train, outside))
    return logits


def margins(logits, labels):
    """How far the label's logit is below the largest other one."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def along(influence, train, measure):
    """The mean of a measure of the logits over the checkpoints after the first."""
    module, found = Classifier(), []
    for checkpoint in influence.trajectory.checkpoints[1:]:
        module.load_state_dict(checkpoint.load().parameters)
        found.append(measure(logits_of(module, train), train.tensors[1]))
    return torch.stack(found).mean(0)


def ranked_loss(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none").argsort().argsort().double()


def unlikely(logits, labels):
    return -logits.softmax(1).gather(1, labels[:, None])[:, 0]


def harm(attributor, method, held):
    """How much an example makes the mean held-out example worse."""
    return -attributor.score(method, held, aggregate="mean").values[0]


def lists(influence, train, held, seed, epochs):
    """Functions that return the suspicion of each training example, high for what looks wrong, by name."""
    attributor, labels = influence.attributor, train.tensors[1]
    module = attributor.module
    found = {
        "loss at the end": lambda: attributor.losses().values,
        "mean loss over checkpoints": lambda: attributor.losses(checkpoints="all").values,
        "mean rank by loss over checkpoints (by hand)": lambda: along(influence, train, ranked_loss),
        "mean probability over checkpoints (by hand)": lambda: along(influence, train, unlikely),
        "margin at the end (by hand)": lambda: margins(logits_of(module, train), labels),
        "area under the margin (by hand)": lambda: along(influence, train, margins),
        "TracInCP, self-influence": lambda: attributor.self_influence(TracInCP()).values,
        "GradientDot, self-influence": lambda: attributor.self_influence(GradientDot()).values,
        "EK-FAC, self-influence": lambda: attributor.self_influence(InfluenceFunction(EKFAC())).values,
        "RepresenterPoints, self-influence": lambda: attributor.self_influence(RepresenterPoints()).values,
        "SOURCE, self-influence": lambda: attributor.self_influence(SOURCE()).values,
        "TracInCP, harm to held-out data": lambda: harm(attributor, TracInCP(), held),
        "GAS, harm to held-out data": lambda: harm(attributor, TracInCP(normalize="cosine"), held),
        "EK-FAC, harm to held-out data": lambda: harm(attributor, InfluenceFunction(EKFAC()), held),
        "KNNShapley, harm to held-out data": lambda: -attributor.score(KNNShapley(), held).values.mean(0),
        "KNNShapley, harm to training data": lambda: -attributor.score(KNNShapley(), "train").values.mean(0),
        "random order": lambda: torch.rand(TRAIN, generator=torch.Generator().manual_seed(seed)),
    }
    return found | with_cleanlab(module, train, seed, epochs)


def with_cleanlab(module, train, seed, epochs):
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return {}
    labels, kept = train.tensors[1].numpy(), {}

    def scored(method, apart):
        if apart and "logits" not in kept:
            kept["logits"] = out_of_sample(train, seed, epochs)
        logits = kept["logits"] if apart else logits_of(module, train)
        probabilities = logits.double().softmax(1).numpy()
        return -torch.tensor(get_label_quality_scores(labels, probabilities, method=method))

    return {
        f"cleanlab, {method} ({'cross-validation' if apart else 'same fit'})": lambda m=method, a=apart: scored(m, a)
        for apart in (False, True)
        for method in ("self_confidence", "normalized_margin")
    }


def precision(suspicion, wrong, fraction):
    """The share of wrong labels among the most suspicious fraction."""
    return wrong[suspicion.argsort(descending=True, stable=True)[: round(fraction * len(wrong))]].double().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="npz with x_train, y_train, idx_train (into all of CIFAR-10)")
    parser.add_argument("--labels", required=True, help="npz with aggre_label, worse_label of all of CIFAR-10")
    parser.add_argument("--noises", nargs="*", default=["aggre", "worse"], help="which labels of people")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8, help="of the fit; more memorise more")
    parser.add_argument("--without", nargs="*", default=[], help="lists to leave out, by the beginning of their names")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    for noise in arguments.noises:
        rows = {}
        for seed in range(arguments.seeds):
            train, held, wrong = noisy(arguments.images, arguments.labels, noise, seed)
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                _, influence = fit(train, seed, arguments.epochs, folder)
                fitted = time.process_time() - start
                learned = logits_of(influence.attributor.module, train).argmax(1) == train.tensors[1]
                shares = f"{wrong.double().mean():.1%} wrong, {learned.double().mean():.1%} learned"
                print(f"{noise}, seed {seed}: {shares}, fit in {fitted:.0f} s", flush=True)
                for name, work in lists(influence, train, held, seed, arguments.epochs).items():
                    if name.startswith(tuple(arguments.without) or ("-",)):
                        continue
                    start = time.process_time()
                    suspicion = work()
                    seconds = time.process_time() - start
                    rows.setdefault(name, []).append([*(precision(suspicion, wrong, f) for f in FRACTIONS), seconds])
        print(f"\n| {noise} | 1 % | 5 % | 10 % | seconds |\n|---|---|---|---|---|")
        for name, found in rows.items():
            low, middle, high, seconds = torch.tensor(found).double().mean(0).tolist()
            print(f"| {name} | {low:.2f} | {middle:.2f} | {high:.2f} | {seconds:.1f} |")
        print(flush=True)


if __name__ == "__main__":
    main()
