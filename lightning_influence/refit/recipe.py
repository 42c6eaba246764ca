"""Trains one model on a subset of the training data under a seed, with the user's own Trainer."""

import contextlib
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.module.task import unwrapped
from lightning_influence.processes import alone, connected
from lightning_influence.refit.store import TrainedModel
from lightning_influence.types import clean


@dataclass(frozen=True)
class Recipe:
    """The user's factories and dataset; can be sent to other processes.

    Args:
        make_module: returns a new LightningModule.
        make_trainer: returns a new Trainer.
        make_dataloader: returns the training loader of a ``Subset``.
        dataset: the whole training dataset.
    """

    make_module: Callable[[], Any]
    make_trainer: Callable[[], Any]
    make_dataloader: Callable[[Any], Any]
    dataset: Any

    def check(self) -> None:
        """Calls each factory twice before anything is trained.

        Raises:
            ValueError: one of them returns the same object twice, or modules that share their parameters; a Trainer of
                several processes, where each of several trains other models.
        """
        with isolated_random_state(), quiet_lightning():
            first, second = self.make_module(), self.make_module()
            trainers = self.make_trainer(), self.make_trainer()
        addresses = [{p.data_ptr() for p in module.parameters() if p.numel()} for module in (first, second)]
        if first is second or addresses[0] & addresses[1]:
            raise ValueError(
                "Expected `make_module` to return a new module each time, got the same one twice"
                f"{'' if first is second else ' (its parameters are shared)'}: each model would continue from "
                "the weights of the previous one. Build the module inside the function."
            )
        if trainers[0] is trainers[1]:
            raise ValueError(
                "Expected `make_trainer` to return a new Trainer each time, got the same one twice: a Trainer that has "
                "finished does not train again. Build the Trainer inside the function."
            )
        if connected() and trainers[0].world_size > 1:
            raise ValueError(
                f"Expected `make_trainer` to return a Trainer of one process, got {trainers[0].world_size}: each "
                "process trains other models. Pass `Trainer(devices=1, num_nodes=1)` in it."
            )

    def initial(self, seed: int) -> dict[str, Tensor]:
        """The untrained model of a seed."""
        with isolated_random_state():
            seed_everything(seed)
            return weights_of(self.make_module())

    def train(self, membership: Tensor, seed: int) -> TrainedModel:
        """Trains one model; the global random state is restored.

        Raises:
            ValueError: the Trainer took no step, or the weights did not change or are not finite.
        """
        start = time.perf_counter()
        subset = Subset(self.dataset, membership.nonzero()[:, 0].tolist())
        with alone(), isolated_random_state(), quiet_lightning():
            seed_everything(seed)
            module = self.make_module()
            before = weights_of(module)
            trainer = self.make_trainer()
            trainer.fit(module, self.make_dataloader(subset))
            after = weights_of(module)
        model = TrainedModel(membership, seed, time.perf_counter() - start, after)
        _check_trained(trainer, before, model)
        return model


def _check_trained(trainer: Any, before: dict[str, Tensor], model: TrainedModel) -> None:
    if getattr(trainer, "interrupted", False):
        raise KeyboardInterrupt
    if trainer.global_step == 0 or all(torch.equal(before[name], model.weights[name]) for name in before):
        raise ValueError(
            f"Expected the Trainer of `make_trainer` to train, got {trainer.global_step} steps "
            f"(`max_epochs={trainer.max_epochs}`, `limit_train_batches={trainer.limit_train_batches}`) that left the "
            "weights unchanged. Check `make_trainer`, `make_dataloader` and which parameters require gradients."
        )
    if model.broken:
        raise ValueError(f"Expected finite weights after training, got NaN or infinity in `{model.broken}`.")


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and persistent buffers on the CPU, by name without the prefix of ``torch.compile``."""
    state = unwrapped(module).state_dict()
    named = {*dict(unwrapped(module).named_parameters()), *dict(unwrapped(module).named_buffers())}
    return {clean(name): value.detach().cpu().clone() for name, value in state.items() if name in named}


def seed_everything(seed: int) -> None:
    """Seeds what ``pytorch_lightning.seed_everything(seed)`` does, so that the user can train the same model alone."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences what every new Trainer logs about accelerators, until the context ends."""
    names = ("lightning", "pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
