"""Fits in several processes that score together when each ends: gloo_score.py FOLDER STRATEGY PROCESSES WORD..

One fit for each word, in a folder of its name. A strategy that spawns leaves the results to the process that started.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from fits import QUIET, Leaves, leaves_its_processes, loader, seeded
from torch.utils.data import TensorDataset

import lightning_influence as li
from lightning_influence.callback.end_of_fit import EndOfFit
from lightning_influence.processes import ProcessLost

N = 23
FEW = ("TracInCP", "cosine", "EKFAC", "GradientDot")
SHARES = (11, 12)  # examples of each of two processes


class Digits(pl.LightningModule):
    """A small convolutional classifier."""

    def __init__(self, dtype=torch.float64, happens=""):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 3, 3),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(27, 5),
            torch.nn.Tanh(),
            torch.nn.Linear(5, 3),
        ).to(dtype)
        self.happens = happens

    def training_step(self, batch, batch_idx):
        x, y = batch
        if not self.training and len(x) in SHARES:
            self.goes_wrong()
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def goes_wrong(self):
        """What happens to one process while all are scoring."""
        rank = os.environ.get("LOCAL_RANK")
        if (rank, self.happens) == ("1", "fails"):
            raise ValueError("this disk is gone")
        if (rank, self.happens) == ("1", "memory"):
            torch.empty(2**60, dtype=torch.uint8)
        if (rank, self.happens) == ("0", "killed"):
            os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01)


class Interrupted:
    """Ctrl-C in this process, between two questions."""

    guarded = EndOfFit._guarded

    @classmethod
    def install(cls):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in processes of some shells

        def asked(self, name, *rest):
            cls.guarded(self, name, *rest)
            if name == "cosine":
                signal.raise_signal(signal.SIGINT)

        EndOfFit._guarded = asked


def data(n, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 5, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x.to(dtype), torch.randint(0, 3, (n,), generator=generator))


def methods():
    return {
        "TracInCP": li.TracInCP(),
        "cosine": li.TracInCP(normalize="cosine"),
        "TracIn": li.TracIn(),
        "HyDRA": li.HyDRA(mode="replay"),
        "EKFAC": li.InfluenceFunction(li.EKFAC()),
        "exact": li.InfluenceFunction(li.ExactGGN()),
        "SOURCE": li.SOURCE(segments=2),
        "KNNShapley": li.KNNShapley(),
        "RepresenterPoints": li.RepresenterPoints(),
        "GradientDot": li.GradientDot(),
    }


def dtype_of(word):
    return torch.float32 if word == "single" else torch.float64


def fit(folder, strategy, count, word):
    """The callback, the Trainer and the module of a fit, with the training data."""
    dtype, asked = dtype_of(word), methods()
    if word not in ("full", "top", "single"):
        asked = {name: asked[name] for name in FEW}
    influence = li.Influence(
        asked,
        data(5, 2, dtype),
        dirpath=folder / word / "influence",
        max_cost=1e9,
        self_influence=True,
        top_k=3 if word == "top" else None,
    )
    options = QUIET | {"devices": count, "strategy": strategy, "max_epochs": 2, "callbacks": [influence, Leaves()]}
    trainer, module, train = pl.Trainer(**options), seeded(Digits, dtype, word), data(N, 1, dtype)
    trainer.fit(module, loader(train, batch_size=6))
    return influence, trainer, module, train


def write(folder, word, influence, group, rank):
    found = {name: influence.scores[name] for name in influence.scores}
    best = {n: (s.proponents(3), s.opponents(3)) for n, s in found.items()}
    (folder / word).mkdir(exist_ok=True)
    torch.save(
        {
            "scores": {} if word == "top" else {name: s.values.clone() for name, s in found.items()},
            "top": {n: [(t.scores, t.train_ids) for t in pair] for n, pair in best.items()},
            "self": {name: influence.self_scores[name].values.clone() for name in influence.self_scores},
            "group": group,
            "reasons": (influence.scores.reasons, influence.self_scores.reasons),
            "notes": {name: s.notes for name, s in found.items()},
            "run": str(influence.run_dir),
        },
        folder / word / f"scores-{rank}.pt",
    )


def scores_by_hand(folder, word, influence, trainer, module, train):
    """Asks once more, with the Trainer of the fit and with a new one."""
    group = None
    for asking in (trainer, pl.Trainer(**QUIET | {"devices": trainer.num_devices, "strategy": "ddp"})):
        attributor = li.Attributor(module, train, influence.trajectory, asking)
        assert attributor.processes.count == trainer.num_devices
        group = attributor.group(li.TracInCP(), [1, 9, 22], data(5, 2, dtype_of(word)))
    return group


def main(folder, strategy, count, *words):
    for word in words:
        if word == "interrupted" and os.environ.get("LOCAL_RANK") == "1":
            Interrupted.install()
        try:
            influence, trainer, module, train = fit(folder, strategy, count, word)
        except ProcessLost as lost:
            (folder / "lost.txt").write_text(str(lost))
            raise
        if strategy == "ddp":
            ask = word not in ("fails", "interrupted")
            group = scores_by_hand(folder, word, influence, trainer, module, train) if ask else None
            write(folder, word, influence, group, trainer.global_rank)
        else:
            write(folder, word, influence, None, strategy)
        EndOfFit._guarded = Interrupted.guarded


def connected_by_hand(folder, word):
    """Processes that are not connected work alone, and together once the strategy of a new Trainer connects them."""
    module, train = seeded(Digits, dtype_of(word)), data(N, 1, dtype_of(word))
    trainer = pl.Trainer(**QUIET | {"devices": 2, "strategy": "ddp"})
    for expected in (1, 2):
        attributor = li.Attributor(module, train, li.Trajectory.load(folder / word / "influence"), trainer)
        assert attributor.processes.count == expected
        values = attributor.score(li.TracInCP(), data(5, 2, dtype_of(word))).values
        torch.save(values, folder / f"by-hand-{expected}-{os.environ['LOCAL_RANK']}.pt")
        trainer.strategy.setup_environment()


if __name__ == "__main__":
    leaves_its_processes()
    warnings.simplefilter("default")
    torch.set_num_threads(1)
    if sys.argv[2] == "by hand":
        connected_by_hand(Path(sys.argv[1]), sys.argv[4])
    else:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
