"""A fit in several processes that score together when it ends: gloo_score.py FOLDER STRATEGY PROCESSES [WORD]."""

import os
import signal
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from fits import QUIET, leaves_its_processes, loader, seeded
from torch.utils.data import TensorDataset

import lightning_influence as li
from lightning_influence.callback.end_of_fit import EndOfFit

N = 23


class Digits(pl.LightningModule):
    """A small convolutional classifier in float64."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 3, 3),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(27, 5),
            torch.nn.Tanh(),
            torch.nn.Linear(5, 3),
        ).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        if "fails" in sys.argv and os.environ.get("LOCAL_RANK") == "1" and not self.training and len(x) > 2:
            raise ValueError("this disk is gone")
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01)


class Interrupted:
    """Ctrl-C in this process, between two questions."""

    @staticmethod
    def install():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in processes of some shells
        guarded = EndOfFit._guarded

        def asked(self, name, *rest):
            guarded(self, name, *rest)
            if name == "cosine":
                signal.raise_signal(signal.SIGINT)

        EndOfFit._guarded = asked


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 5, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


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


def without_self():
    return ("cosine", "TracIn", "KNNShapley")


if __name__ == "__main__":
    leaves_its_processes()
    warnings.simplefilter("default")
    torch.set_num_threads(1)
    folder, strategy, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if "interrupted" in sys.argv and os.environ.get("LOCAL_RANK") == "1":
        Interrupted.install()
    influence = li.Influence(
        methods(),
        data(5, 2),
        dirpath=folder / "influence",
        max_cost=1e9,
        self_influence=True,
        top_k=3 if "top" in sys.argv else None,
    )
    options = QUIET | {"devices": count, "strategy": strategy, "max_epochs": 2, "callbacks": [influence]}
    trainer = pl.Trainer(**options)
    module = seeded(Digits)
    trainer.fit(module, loader(data(N, 1)))
    if influence.run_dir is None:  # processes that were spawned have ended, and left files
        sys.exit()
    rank = trainer.global_rank
    found = {name: influence.scores[name] for name in influence.scores}
    if "killed" in sys.argv and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    attributor = li.Attributor(module, data(N, 1), influence.trajectory, trainer)
    group = None if {"fails", "interrupted"} & {*sys.argv} else attributor.group(li.TracInCP(), [1, 9, 22], data(5, 2))
    best = {n: (s.proponents(3), s.opponents(3)) for n, s in found.items()}
    torch.save(
        {
            "scores": {} if "top" in sys.argv else {name: s.values.clone() for name, s in found.items()},
            "top": {n: [(t.scores, t.train_ids) for t in pair] for n, pair in best.items()},
            "self": {name: influence.self_scores[name].values.clone() for name in influence.self_scores},
            "group": group,
            "reasons": (influence.scores.reasons, influence.self_scores.reasons),
        },
        folder / f"scores-{rank}.pt",
    )
