"""A small module, its data, and one fit of it on a device."""

import warnings

import pytorch_lightning as pl
import torch
from fits import QUIET
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from devices.trainers import on
from lightning_influence import Influence


class Net(pl.LightningModule):
    """An MLP on a convolution, with dropout where asked for."""

    def __init__(self, dropout=0.0, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(1, 2, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8, 4),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(4, 3),
        )
        self.optimizer, self.options = optimizer, {"lr": 0.1, **options}

    def forward(self, x):
        return self.net(x[:, None])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)


def data(n, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 6, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g))


def trainer(device="cpu", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(**{**QUIET, **(on(device) if device != "cpu" else {}), "max_epochs": 2, **options})


def fitted(folder, dtype, device="cpu", batch_size=4, shuffle=True, net=None, **arguments):
    """(module, training data, callback) after two epochs."""
    torch.manual_seed(0)
    module, train = (net or Net()).to(dtype), data(14, 1, dtype)
    influence = Influence(arguments.pop("methods", []), dirpath=folder, log_scores=False, max_cost=1e9, **arguments)
    trainer(device, callbacks=[influence]).fit(module, DataLoader(train, batch_size, shuffle=shuffle))
    return module, train, influence
