"""A fit in several processes that retrain models together: gloo_refit.py FOLDER PROCESSES [refused]."""

import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from fits import QUIET, leaves_its_processes, loader, seeded
from gloo_score import Digits, N, data

import lightning_influence as li
from lightning_influence.refit.store import ModelStore


class Gathering(Digits):
    """Its metric is of all processes, if there are several; they train other numbers of models."""

    def on_train_batch_end(self, *_):
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(torch.ones(1))


def full(store, models):
    raise OSError("this disk is full")


def make_trainer():
    return pl.Trainer(**QUIET | {"devices": 2 if "refused" in sys.argv else 1, "max_epochs": 1})


def refit(kind, folder):
    if kind == "fixed":
        return li.Refit(dirpath=folder / kind)
    return li.Refit(Gathering, make_trainer, loader, kind, folder / kind)


def answers(module, trajectory, folder, trainer=None):
    """Scores of methods that retrain and losses of a bank, or what is refused."""
    found = {}
    for kind in ("fixed", "independent"):
        attributor = li.Attributor(module, data(N, 1), trajectory, trainer, refit=refit(kind, folder))
        questions = {
            "leave one out": lambda a=attributor: a.score(li.LeaveOneOut((3, 7, 11, 20, 21)), data(5, 2)).values,
            "one model": lambda a=attributor: a.score(li.LeaveOneOut((4,)), data(5, 2)).values,
            "downsampling": lambda a=attributor: a.estimate(li.Downsampling(7), data(5, 2)).standard_errors,
            "memorised": lambda a=attributor: a.self_influence(li.Downsampling(12)).values,
            "bank": lambda a=attributor: a.refit.bank(data(5, 2), n_subsets=3).losses,
            "Shapley": lambda a=attributor: a.score(li.DataShapley(2 * N, tolerance=0.01), data(5, 2)).values,
        }
        for name, ask in questions.items():
            try:
                found[kind, name] = ask()
            except (ValueError, RuntimeError, OSError) as error:
                found[kind, name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    leaves_its_processes()
    warnings.simplefilter("default")
    torch.set_num_threads(1)
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    influence = li.Influence(dirpath=folder / "influence")
    options = QUIET | {"devices": count, "strategy": "ddp", "max_epochs": 2, "callbacks": [influence]}
    trainer, module = pl.Trainer(**options), seeded(Digits)
    trainer.fit(module, loader(data(N, 1)))
    if "refused" in sys.argv and trainer.global_rank == 1:
        ModelStore.add = full
    found = answers(module, influence.trajectory, folder, trainer)
    torch.save(found, folder / f"refit-{trainer.global_rank}.pt")
