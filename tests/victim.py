"""A slow fit in a process of its own, to be killed or starved: python victim.py FOLDER [full | alone | tracked]."""

import multiprocessing
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from fits import Indexed, Net, by_epoch, fit, seeded
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_influence.callback.influence import Influence


class Slow(Callback):
    def __init__(self, started, full):
        self.started, self.full = started, full

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.01)

    def on_train_epoch_start(self, trainer, pl_module):
        self.started()
        if trainer.current_epoch == 2 and self.full:  # from here on no file may be longer than this
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def train(folder, *words, started=lambda: None):
    """Train a new fit, or go on from the last checkpoint in the folder; ``started`` is called at each epoch's start."""
    torch.set_num_threads(1)
    full = "full" in words or "alone" in words  # without checkpoints of Lightning's own
    options = {}
    if "tracked" in words:
        from tracking.test_resume import METHODS

        options = {"methods": METHODS, "queries": Indexed(5), "max_cost": 1e9}
    influence = Influence(dirpath=folder / "influence", every_n_train_steps=4, **options)
    # At the ends of epochs: in the middle of one, or at its last batch, a plain DataLoader begins the epoch anew.
    at_ends = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    keep = [] if full else [ModelCheckpoint(folder / "ckpt", **at_ends, save_top_k=1, save_last=True)]
    last = folder / "ckpt" / "last.ckpt"
    fit(
        seeded(Net, momentum=0.9, schedule="epoch"),
        by_epoch(),
        influence,
        Slow(started, "full" in words),
        *keep,
        max_epochs=20,
        enable_checkpointing=not full,
        ckpt_path=last if last.exists() else None,
    )


FORK = multiprocessing.get_context("fork")  # a fork has made its imports


def begun(folder, *words):
    """A process that trains, and an event that is set when its first epoch starts."""

    def work():
        warnings.simplefilter("ignore")
        train(folder, *words, started=started.set)

    started = FORK.Event()
    process = FORK.Process(target=work)
    process.start()
    return process, started


def finishes(folder, *words):
    """Let a fit train to its end."""
    process, _ = begun(folder, *words)
    process.join(120)
    assert process.exitcode == 0


def killed(folder, moments, check, *words):
    """Kill a fit so many times, resume each time from Lightning's last checkpoint, and let the last one finish.

    The moments together are shorter than the fit: one killed behind its last batch trains on when it is resumed.

    Args:
        folder: of all its runs.
        moments: seconds from the start of the training to each kill.
        check: looks at what is left in the folder after each.
        words: as for ``train``.
    """
    for moment in moments:
        process, started = begun(folder, *words)
        assert started.wait(60)
        time.sleep(moment)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        check(folder)
    finishes(folder, *words)


def show(message, category, *_, **__):
    print(category.__name__, message, flush=True)


if __name__ == "__main__":
    warnings.showwarning = show
    train(Path(sys.argv[1]), *sys.argv[2:])
    print("finished", flush=True)
