"""Data of the generator: datasets with masks, loaders and hooks; and each example as its step would get it alone."""

import functools
import random

import pytorch_lightning as pl
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
)

from generated.losses import CLASSES, LOSSES
from generated.modules import FEATURES

ROWS, TIME, BATCH = 19, 3, 5
MASKS = ("none", "lengths", "some ignored", "one odd row", "odd tail", "ignored row")


class Rows(Dataset):
    """Dicts of tensors; ``noise`` is drawn at each reading, and what was given last is kept."""

    def __init__(self, loss, mask, seed, noise=0.0):
        g = torch.Generator().manual_seed(seed)
        kind, ignores = LOSSES[loss].kind, LOSSES[loss].ignores
        self.noise, self.given = noise, {}
        self.x = torch.randn(ROWS, TIME, FEATURES, generator=g, dtype=torch.float64)
        self.mask = torch.ones(ROWS, TIME, dtype=torch.float64)
        if kind in ("row", "token"):
            self.y = torch.randint(CLASSES, (ROWS, TIME) if kind == "token" else (ROWS,), generator=g)
        else:
            shape = (ROWS, 2) if kind == "pair" else (ROWS,)
            self.y = torch.randn(shape, generator=g, dtype=torch.float64)
        if mask == "lengths":
            for i, length in enumerate(torch.randint(1, TIME + 1, (ROWS,), generator=g).tolist()):
                self.mask[i, length:] = 0
                if kind == "token" and ignores:
                    self.y[i, length:] = -100
        elif mask != "none" and ignores:
            self._ignore(mask, g)

    def _ignore(self, mask, g):
        nothing = float("nan") if self.y.is_floating_point() else -100
        if mask == "some ignored":
            self.y[torch.rand(self.y.shape, generator=g) < 0.25] = nothing
        elif mask == "odd tail":
            self.y[-3:].view(3, -1)[:, 0] = nothing
        else:
            row = int(torch.randint(1, ROWS - 1, (1,), generator=g))
            of_row = self.y[row : row + 1].view(1, -1)
            of_row[:, : None if mask == "ignored row" else max(1, of_row.shape[1] - 1)] = nothing

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        if isinstance(i, list):  # a BatchSampler used as the sampler
            return default_collate([self[j] for j in i])
        x = self.x[i]
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, dtype=x.dtype)
        item = {"x": x, "y": self.y[i], "mask": self.mask[i], "idx": i}
        self.given[i] = item
        return item


# ---- between the dataset and the step --------------------------------------------------------------------------------


def normalising(items):
    batch = default_collate(items)
    return {**batch, "x": batch["x"] * 4.0 + 1.0}


def trimmed(items):
    """Batches as long as their longest example."""
    batch = default_collate(items)
    length = int(batch["mask"].sum(1).max())
    cut = {key: batch[key][:, :length] for key in ("x", "mask")}
    return {
        **batch,
        **cut,
        **({"y": batch["y"][:, :length]} if batch["y"].ndim == 2 and len(batch["y"][0]) == TIME else {}),
    }


def mixed_up(items):
    """MixUp with a random partner."""
    batch = default_collate(items)
    order = list(range(len(items)))
    random.shuffle(order)
    share = 0.6 + 0.4 * random.random()
    return {**batch, "x": share * batch["x"] + (1 - share) * batch["x"][order]}


def weights_of(n):
    return torch.linspace(0.2, 3.0, n, dtype=torch.float64)


def plain(data, **options):
    return DataLoader(data, BATCH, **options)


def by_batch_sampler(data):
    return DataLoader(data, sampler=BatchSampler(RandomSampler(data), BATCH, False), batch_size=None)


LOADERS = {
    "in order": plain,
    "shuffled": functools.partial(plain, shuffle=True),
    "weighted": lambda data: plain(data, sampler=WeightedRandomSampler(weights_of(len(data)), len(data))),
    "drops last": functools.partial(plain, shuffle=True, drop_last=True),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)),
    "batch_size=None": by_batch_sampler,
    "normalising collate": functools.partial(plain, shuffle=True, collate_fn=normalising),
    "trimming collate": functools.partial(plain, shuffle=True, collate_fn=trimmed),
    "mixing collate": functools.partial(plain, shuffle=True, collate_fn=mixed_up),
    "subset": functools.partial(plain, shuffle=True),
    "a worker": functools.partial(plain, shuffle=True, num_workers=1),
    "random in dataset": functools.partial(plain, shuffle=True),
}
COLLATES = {"normalising collate": normalising, "trimming collate": trimmed, "mixing collate": mixed_up}


def dataset_of(loader, loss, mask, seed):
    data = Rows(loss, mask, seed, noise=0.5 if loader == "random in dataset" else 0.0)
    if loader == "subset":
        return Subset(data, torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:14].tolist())
    return data


# ---- hooks -----------------------------------------------------------------------------------------------------------

KINDS = {
    "before": ("on_before_batch_transfer", lambda x: x * 3.0),
    "after": ("on_after_batch_transfer", lambda x: x.tanh() * 2.0),
    "transfer": ("transfer_batch_to_device", lambda x: x - 0.7),
}
HOOKS = ("none", *(f"{kind} in {owner}" for kind in KINDS for owner in ("module", "datamodule")), "datamodule")


def change_of(hooks):
    """What the hook does to the inputs."""
    kind = hooks.split(" in ")[0]
    return KINDS[kind][1] if kind in KINDS else lambda x: x


def hooked(cls, hooks):
    """The class with the hook in it."""
    kind = hooks.split(" in ")[0]
    if kind not in KINDS:
        return cls
    name, change = KINDS[kind]

    def hook(self, batch, *rest):
        return {**batch, "x": change(batch["x"])}

    return type(cls.__name__, (cls,), {name: hook})


class Data(pl.LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader


def datamodule_of(hooks, loader):
    """A DataModule with the hook, or None where the axis has none."""
    if hooks.endswith("datamodule"):
        return hooked(Data, hooks)(loader)
    return None
