"""Ridge regression: trained by the user's Trainer, or at once by its normal equations."""

import time

import pytorch_lightning as pl
import torch
from fits import QUIET
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributor, Refit
from lightning_influence.refit.pool import Failure
from lightning_influence.refit.store import TrainedModel

DECAY, WIDTH = 0.3, 3


class Ridge(pl.LightningModule):
    """Squared error; the regulariser is the optimizer's, and reaches every weight."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, 1, bias=False, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.layer(x)[:, 0] - y).pow(2).mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.4, weight_decay=DECAY)


class Solved(Ridge):
    """To the optimum, in one step of a second-order optimizer."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + DECAY / 2 * self.layer.weight.pow(2).sum()

    def configure_optimizers(self):
        return torch.optim.LBFGS(
            self.parameters(), max_iter=60, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )


def plain_loss(module, batch):
    x, y = batch
    return (module.layer(x)[:, 0] - y).pow(2) / 2


def data(n=12, seed=0, classes=False):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=draw, dtype=torch.float64)
    if classes:
        return TensorDataset(x, torch.arange(n) % 3)
    return TensorDataset(x, x @ torch.tensor([1.0, -2.0, 0.5]).double() + torch.randn(n, generator=draw).double())


def make_trainer():
    return pl.Trainer(**QUIET, max_epochs=1)


def make_loader(subset):
    return DataLoader(subset, batch_size=len(subset))


def attributor(train, refit, module=None):
    torch.manual_seed(0)
    return Attributor(module or Ridge(), train=train, refit=refit, loss=plain_loss)


class ClosedForm:
    """Trains in no time: the optimum on a subset, with the divisor of the whole set kept."""

    def __init__(self, train, fail=(), pause=0.0, noise=0.0):
        self.x, self.y = (part.double() for part in train.tensors)
        self.seeded, self.trained, self.fail, self.pause, self.noise = bool(noise), [], set(fail), pause, noise

    def identity(self):
        return {"seeds": "closed form"}

    def initial(self, seed):
        return {"layer.weight": torch.zeros(1, WIDTH, dtype=torch.float64)}

    def train_all(self, jobs, take, done):
        failures, models = [], []
        for membership, seed in jobs:
            out = (~membership).nonzero()[:, 0].tolist()
            if self.fail.intersection(out):
                failures.append(Failure((membership, seed), "ValueError: told to"))
                continue
            time.sleep(self.pause)
            self.trained.append((tuple(membership.tolist()), seed))
            weight = normal_equations(self.x, self.y, membership)
            if self.noise:
                weight = weight + self.noise * torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))
            models.append(TrainedModel(membership, seed, 0.0, {"layer.weight": weight}))
            done(1)
            if self.pause or len(models) == 100:
                take(models)
                models = []
        take(models)
        return failures


def normal_equations(x, y, membership):
    mask = membership.double()
    n = len(x)
    left = (x * mask[:, None]).T @ x / n + DECAY * torch.eye(WIDTH, dtype=torch.float64)
    return torch.linalg.solve(left, (x * mask[:, None]).T @ y / n)[None]


class ClosedRefit(Refit):
    """A `Refit` with another way of training."""

    def __init__(self, dirpath, train, **options):
        super().__init__(dirpath=dirpath)
        self.way = ClosedForm(train, **options)

    def _backend(self, subject):
        return self.way
