"""One fit of a configuration, watched by a callback of the test's own: the batches, rates, clocks and weights in it."""

import copy
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from fits import QUIET

from generated.data import LOADERS, change_of, datamodule_of, dataset_of, hooked
from generated.losses import LOSSES
from generated.modules import MODULES, build
from lightning_influence import Influence

EPOCHS = 2


class Config(NamedTuple):
    """One value of each axis, and the seed of everything random in it."""

    module: str
    loss: str
    mask: str
    loader: str
    hooks: str
    seed: int


def facts(trainer):
    """What a step may read of its Trainer, by plain attributes."""
    return SimpleNamespace(
        estimated_stepping_batches=trainer.estimated_stepping_batches,
        num_training_batches=trainer.num_training_batches,
        max_epochs=trainer.max_epochs,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        current_epoch=trainer.current_epoch,
        global_step=trainer.global_step,
        datamodule=trainer.datamodule,
        optimizers=[SimpleNamespace(param_groups=[{"lr": trainer.optimizers[0].param_groups[0]["lr"]}])],
        training=True,
        numbers={name: value for name, value in vars(trainer.lightning_module).items() if type(value) is float},
    )


def tensors_of(module):
    """Copies of all weights, buffers and plain tensor attributes, by name."""
    found = {n: t.detach().clone() for n, t in module.state_dict().items()}
    for name, part in module.named_modules():
        for key, value in part.__dict__.items():
            if isinstance(value, torch.Tensor):
                found[f"{name}.{key}".lstrip(".")] = value.detach().clone()
    return found


@dataclass
class Step:
    """One micro-batch of the fit, as it entered ``training_step``."""

    batch: dict
    index: int
    epoch: int
    state: dict
    facts: object
    rates: list = field(default_factory=list)

    @property
    def ids(self):
        return self.batch["idx"].tolist()


class Watch(pl.Callback):
    """Writes down the fit without touching it."""

    def __init__(self, files=None):
        self.steps, self.states, self.clocks, self.files = [], [], [], files

    def on_train_start(self, trainer, module):
        self.start = tensors_of(module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.steps.append(
            Step(copy.deepcopy(batch), batch_idx, trainer.current_epoch, tensors_of(module), facts(trainer))
        )

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps[-1].rates = [group["lr"] for group in optimizer.param_groups]

    def on_train_epoch_end(self, trainer, module):
        self.states.append(tensors_of(module))
        self.clocks.append(facts(trainer))
        if self.files is not None:
            trainer.save_checkpoint(self.files / f"{trainer.current_epoch}.ckpt")


class Fit:
    """A configuration, fitted for two epochs with the callback (or without)."""

    def __init__(self, config, folder, capture=True):
        self.config, self.loss = config, LOSSES[config.loss]
        self.made, self.body, self.ordinary = MODULES[config.module]
        self.module = self.fresh(config.seed)
        self.dataset = dataset_of(config.loader, config.loss, config.mask, config.seed)
        self.queries = torch.utils.data.Subset(
            dataset_of("in order", config.loss, "lengths" if config.mask == "lengths" else "none", config.seed + 1),
            [0, 4, 9],
        )
        self.loader = LOADERS[config.loader](self.dataset)
        self.datamodule = datamodule_of(config.hooks, self.loader)
        self.files = folder / "files"
        self.watch = Watch(self.files)
        self.influence = Influence(dirpath=folder / "runs", loss=self.loss.each) if capture else None
        callbacks = [self.watch, *([self.influence] if capture else [])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = pl.Trainer(**QUIET, max_epochs=EPOCHS, callbacks=callbacks)
            torch.manual_seed(config.seed)
            self.trainer.fit(self.module, **self.data())

    def data(self):
        return {"train_dataloaders": self.loader} if self.datamodule is None else {"datamodule": self.datamodule}

    def fresh(self, seed):
        """A module of this configuration with other weights."""
        module = build(self.config.module, self.config.loss, seed)
        if self.config.hooks.endswith("in module"):
            module.__class__ = hooked(type(module), self.config.hooks)
        return module

    def entered(self, item):
        """The batch of one that an item is when it enters the step: collated, then changed by the hooks."""
        collate = getattr(self.loader, "collate_fn", None)
        if self.config.loader == "batch_size=None":
            collate = torch.utils.data.default_collate
        batch = collate([item])
        return {**batch, "x": change_of(self.config.hooks)(batch["x"])}
