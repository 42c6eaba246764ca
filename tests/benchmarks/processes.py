"""Seconds and bytes to score on two processes over one, one thread each: python processes.py FOLDER [PROCESSES]."""

import os
import pickle
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

# By name: the method and the number of training examples. EK-FAC passes over them ten times for each of its passes.
METHODS = {"TracInCP": (li.TracInCP(), 4000), "EK-FAC": (li.InfluenceFunction(li.EKFAC()), 1000)}
QUERIES = 32
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


class Sent:
    """Counts what this process sends in all exchanges, in bytes."""

    def __init__(self):
        self.bytes = 0
        self._count("all_gather_object", lambda everyone, mine, *_, **__: len(pickle.dumps(mine)))
        self._count("all_reduce", lambda tensor, *_, **__: tensor.nbytes)
        self._count("broadcast_object_list", lambda sent, src=0, **_: len(pickle.dumps(sent)) * (src == rank()))

    def _count(self, name, size):
        exchange = getattr(torch.distributed, name)

        def counted(*args, **kwargs):
            self.bytes += size(*args, **kwargs)
            return exchange(*args, **kwargs)

        setattr(torch.distributed, name, counted)


def rank():
    return torch.distributed.get_rank()


def measure(folder, count):
    """Fit and ask each question twice, the second time without the curvature that the first one stored.

    The first question includes the checks of the module and of its gradients.
    """
    sent, strategy = Sent(), "ddp" if count > 1 else "auto"
    for name, (method, n) in METHODS.items():
        influence, module = li.Influence(dirpath=folder / name), Net()
        options = OPTIONS | {"accelerator": "cpu", "devices": count, "strategy": strategy, "max_epochs": 1}
        trainer, train, queries = pl.Trainer(**options, callbacks=[influence]), data(n, 1), data(QUERIES, 2)
        trainer.fit(module, DataLoader(train, 50, shuffle=True))
        attributor = li.Attributor(module, train, influence.trajectory, trainer)
        for when in ("first", "later"):
            if trainer.is_global_zero:
                shutil.rmtree(influence.run_dir / "curvature", ignore_errors=True)
            trainer.strategy.barrier()
            before, begun = sent.bytes, (time.perf_counter(), time.process_time())
            attributor.score(method, queries)
            wall, own = time.perf_counter() - begun[0], time.process_time() - begun[1]
            if trainer.is_global_zero:
                print(f"{name}, {when}\t{wall:.3f}\t{own:.3f}\t{sent.bytes - before}", flush=True)
    if count > 1:
        torch.distributed.destroy_process_group()


def rates(folder):
    """MB/s of writing scores and of reading a checkpoint of as many bytes, by the clock and by CPU seconds."""
    values = torch.randn(100, 2**18)
    scores = li.Scores(values, None, torch.arange(values.shape[1]), torch.arange(len(values)), method="TracInCP")
    torch.save({"w": values}, folder / "state.pt")
    works = {
        "scores written": lambda: scores.save(folder / "scores.arrow"),
        "weights read": lambda: torch.load(folder / "state.pt"),
    }
    for name, work in works.items():
        begun = time.perf_counter(), time.process_time()
        work()
        wall, own = time.perf_counter() - begun[0], time.process_time() - begun[1]
        mb = values.nbytes / 1e6
        print(f"{name}: {mb:.0f} MB at {mb / wall:.0f} MB/s, {mb / own:.0f} MB per CPU s")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        measure(folder, int(sys.argv[2]))
        sys.exit()
    found = []
    for count in (1, 2):
        command = [sys.executable, __file__, str(folder / f"{count}"), str(count)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
        rows = [line.split("\t") for line in done.stdout.splitlines() if line.count("\t") == 3]
        found.append({name: tuple(map(float, row)) for name, *row in rows})
    print("question         1: wall, CPU s   2: wall, CPU s of rank 0   ratio of wall, of CPU   sent by rank 0, bytes")
    for name, (one, own, _) in found[0].items():
        two, other, sent = found[1][name]
        ratios = f"{two / one:12.2f} {other / own:8.2f}"
        print(f"{name:16} {one:6.2f} {own:6.2f} {two:8.2f} {other:8.2f} {ratios} {sent:16.0f}")
    rates(folder)
