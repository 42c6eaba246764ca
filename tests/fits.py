"""Small fits for tests: a dataset that returns its own index, a module that writes down what it is given."""

import atexit
import multiprocessing

import pytorch_lightning as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Indexed(Dataset):
    """The batch itself says which examples are in it."""

    def __init__(self, n=23, noise=0.0):
        self.n, self.noise = n, noise
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 4, generator=generator)
        self.y = torch.randn(n, 1, generator=generator)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        x = self.x[i] + self.noise * torch.randn(4) if self.noise else self.x[i]
        return {"x": x, "y": self.y[i], "idx": i}


class Stream(IterableDataset):
    def __init__(self, n=23):
        self.n = n

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, every = (info.id, info.num_workers) if info else (0, 1)
        data = Indexed(self.n)
        return (data[i] for i in range(first, self.n, every))


class OddFirst(BatchSampler):
    """Batches of different sizes, odd indices first."""

    def __iter__(self):
        order = sorted(self.sampler, key=lambda i: i % 2 == 0)
        while order:
            size = 2 + len(order) % 3
            yield order[:size]
            order = order[size:]

    def __len__(self):
        return sum(1 for _ in OddFirst.__iter__(self))


class ByEpoch(Sampler):
    """An order that depends on the epoch alone, so that a resumed fit can have that of an undisturbed one."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(23, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self):
        return 23


def by_epoch():
    return DataLoader(Indexed(), 4, sampler=ByEpoch())


class Net(pl.LightningModule):
    """A linear regression, and what it saw: ``seen`` has the indices of each micro-batch."""

    def __init__(self, optimizer="sgd", dropout=0.0, lr=0.1, schedule=None, batchnorm=False, stop_at=None, **settings):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.norm = torch.nn.BatchNorm1d(4) if batchnorm else torch.nn.Identity()
        self.dropout = torch.nn.Dropout(dropout)
        self.kind, self.lr, self.schedule, self.settings, self.stop_at = optimizer, lr, schedule, settings, stop_at
        self.seen = []

    def loss(self, batch):
        x, y = batch["x"].reshape(-1, 4), batch["y"].reshape(-1, 1)
        return (self.layer(self.dropout(self.norm(x))) - y).pow(2).mean()

    def training_step(self, batch, batch_idx):
        self.seen.append(torch.as_tensor(batch["idx"]).reshape(-1).tolist())
        return self.loss(batch)

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.stop_at is not None and batch_idx == self.stop_at else None

    def configure_optimizers(self):
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lbfgs": torch.optim.LBFGS}
        optimizer = kinds[self.kind](self.parameters(), lr=self.lr, **self.settings)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": self.schedule}]


class Double(Net):
    """The same in float64."""

    def __init__(self, **options):
        super().__init__(**options)
        self.double()

    def loss(self, batch):
        return super().loss({"x": batch["x"].double(), "y": batch["y"].double()})


def fit(module, loaders, *callbacks, package=pl, ckpt_path=None, **options):
    """One quiet fit under a seed; returns the Trainer."""
    torch.manual_seed(1)
    trainer = package.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **options})
    trainer.fit(module, loaders, ckpt_path=ckpt_path)
    return trainer


def seeded(make, *args, **kwargs):
    """Make a module under a seed of its own."""
    torch.manual_seed(0)
    return make(*args, **kwargs)


def loader(data=None, batch_size=4, **options):
    return DataLoader(data or Indexed(), batch_size, **{"shuffle": True, **options})


def recorded(trajectory):
    """The micro-batches in the order of training."""
    return [micro for row in trajectory.steps["ids"].to_pylist() for micro in row]


def leaves_its_processes():
    """At its exit this program ends its process group: gloo's threads abort where they outlive the interpreter."""
    atexit.register(leave)


class Leaves(pl.Callback):
    """Does the same when the fit of a spawned process ends, which runs nothing at its exit."""

    def teardown(self, trainer, pl_module, stage):
        if multiprocessing.parent_process() is not None:
            leave()


def leave():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
