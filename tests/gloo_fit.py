"""A fit in two processes, or one with and one without the callback: gloo_fit.py FOLDER STRATEGY WORKERS [both]."""

import sys
import warnings
from pathlib import Path

import torch
from fits import QUIET, Indexed, Leaves, Net, leaves_its_processes, loader, seeded
from pytorch_lightning import Callback, Trainer

from lightning_influence.callback.influence import Influence


class Write(Callback):
    """Each rank writes down what it saw."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save((pl_module.seen, pl_module.layer.weight.detach()), self.folder / f"seen-{trainer.global_rank}.pt")


def fit(folder, strategy, workers, watched=True):
    folder.mkdir(exist_ok=True)
    callbacks = [Write(folder), Leaves()]
    if watched:
        callbacks.insert(0, Influence(dirpath=None if "nowhere" in sys.argv else folder / "influence"))
    options = QUIET | {"devices": 2, "strategy": strategy, "max_epochs": 2, "callbacks": callbacks}
    if "double" in sys.argv:
        options |= {"precision": "64-true"}
    trainer = Trainer(**options)
    module = seeded(Net, dropout=0.5 if "dropout" in sys.argv else 0.0, momentum=0.9 if "momentum" in sys.argv else 0.0)
    trainer.fit(module, loader(Indexed(23), num_workers=workers))


if __name__ == "__main__":
    leaves_its_processes()
    warnings.simplefilter("default" if "nowhere" in sys.argv else "ignore")
    torch.set_num_threads(1)
    folder, strategy, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if "both" in sys.argv:
        fit(folder / "without", strategy, workers, watched=False)
        fit(folder / "with", strategy, workers)
    else:
        fit(folder, strategy, workers, "plain" not in sys.argv)
