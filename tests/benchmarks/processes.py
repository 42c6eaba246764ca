"""Seconds to score on two processes over those on one, one thread each: python processes.py FOLDER [PROCESSES]."""

import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_influence as li

METHODS = {"TracInCP": li.TracInCP(), "EK-FAC": li.InfluenceFunction(li.EKFAC())}
N, QUERIES = 800, 32
OPTIONS = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Net(pl.LightningModule):
    """A CNN of 105,866 parameters."""

    def __init__(self):
        super().__init__()
        n = torch.nn
        first = n.Conv2d(1, 16, 3, padding=1), n.ReLU(), n.MaxPool2d(2)
        second = n.Conv2d(16, 32, 3, padding=1), n.ReLU(), n.MaxPool2d(2), n.Flatten()
        self.net = n.Sequential(*first, *second, n.Linear(32 * 49, 64), n.ReLU(), n.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (n,), generator=generator)
    return TensorDataset(torch.randn(n, 1, 28, 28, generator=generator) + y[:, None, None, None] / 10, y)


def measure(folder, count):
    """Fit, then ask each question twice, the second time without the curvature that the first one stored.

    Each has an attributor of its own, whose first question includes the checks of the module and of its gradients.
    """
    influence = li.Influence(dirpath=folder)
    strategy = "ddp" if count > 1 else "auto"
    options = OPTIONS | {"accelerator": "cpu", "devices": count, "strategy": strategy, "max_epochs": 1}
    trainer, module = pl.Trainer(**options, callbacks=[influence]), Net()
    queries = data(QUERIES, 2)
    trainer.fit(module, DataLoader(data(N, 1), 50, shuffle=True))
    for name, method in METHODS.items():
        attributor = li.Attributor(module, data(N, 1), influence.trajectory, trainer)
        for when in ("first", "later"):
            if trainer.is_global_zero:
                shutil.rmtree(influence.run_dir / "curvature", ignore_errors=True)
            trainer.strategy.barrier()
            begun = time.perf_counter(), time.process_time()
            attributor.score(method, queries)
            wall, own = time.perf_counter() - begun[0], time.process_time() - begun[1]
            if trainer.is_global_zero:
                print(f"{name}, {when}\t{wall:.3f}\t{own:.3f}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        measure(Path(sys.argv[1]), int(sys.argv[2]))
        sys.exit()
    found = []
    for count in (1, 2):
        command = [sys.executable, __file__, str(Path(sys.argv[1]) / f"{count}"), str(count)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows = [line.split("\t") for line in done.stdout.splitlines() if line.count("\t") == 2]
        found.append({name: (float(wall), float(own)) for name, wall, own in rows})
    print("question           1: wall, CPU s   2: wall, CPU s of rank 0   ratio of wall, of CPU")
    for name, (one, own) in found[0].items():
        two, other = found[1][name]
        print(f"{name:16} {one:8.2f} {own:8.2f} {two:8.2f} {other:8.2f} {two / one:15.2f} {other / own:8.2f}")
