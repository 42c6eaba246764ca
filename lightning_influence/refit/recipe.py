"""One model through the user's own Trainer, on a part of the training data, under a seed."""

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

from lightning_influence.module.task import isolated_random_state, unwrapped
from lightning_influence.refit.store import TrainedModel
from lightning_influence.types import clean


@dataclass(frozen=True)
class Recipe:
    """How the user makes a model, a Trainer and a loader; travels to other processes.

    Args:
        make_module: a new LightningModule.
        make_trainer: a new Trainer.
        make_dataloader: the training loader of a ``Subset``.
        dataset: the whole training dataset.
    """

    make_module: Callable[[], Any]
    make_trainer: Callable[[], Any]
    make_dataloader: Callable[[Any], Any]
    dataset: Any

    def check(self) -> None:
        """Calls each factory twice, as cheap as that is, before anything is trained.

        Raises:
            ValueError: one of them returns the same object twice, or modules that share their parameters.
        """
        with isolated_random_state(), quiet_lightning():
            first, second = self.make_module(), self.make_module()
            trainers = self.make_trainer(), self.make_trainer()
        shared = {p.data_ptr() for p in first.parameters() if p.numel()} & {
            p.data_ptr() for p in second.parameters() if p.numel()
        }
        if first is second or shared:
            raise ValueError(
                "Expected `make_module` to make a new module each time, got the same one twice"
                f"{'' if first is second else ' (its parameters are shared)'}: a model would go on from where the one "
                "before stopped. Build the module inside the function."
            )
        if trainers[0] is trainers[1]:
            raise ValueError(
                "Expected `make_trainer` to make a new Trainer each time, got the same one twice: a Trainer that is "
                "done does not train again. Build the Trainer inside the function."
            )

    def initial(self, seed: int) -> dict[str, Tensor]:
        """The untrained model of a seed."""
        with isolated_random_state():
            seed_everything(seed)
            return weights_of(self.make_module())

    def train(self, membership: Tensor, seed: int) -> TrainedModel:
        """Trains one model; the random state outside is as it was.

        Raises:
            ValueError: the Trainer took no step, or the weights are as they were or not finite.
        """
        start = time.perf_counter()
        subset = Subset(self.dataset, membership.nonzero()[:, 0].tolist())
        with isolated_random_state(), quiet_lightning():
            seed_everything(seed)
            module = self.make_module()
            before = weights_of(module)
            trainer = self.make_trainer()
            trainer.fit(module, self.make_dataloader(subset))
            after = weights_of(module)
        _check_trained(trainer, before, after)
        return TrainedModel(membership, seed, time.perf_counter() - start, after)


def _check_trained(trainer: Any, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    if getattr(trainer, "interrupted", False):
        raise KeyboardInterrupt
    if trainer.global_step == 0 or all(torch.equal(before[name], after[name]) for name in before):
        raise ValueError(
            f"Expected the Trainer of `make_trainer` to train, got {trainer.global_step} steps "
            f"(`max_epochs={trainer.max_epochs}`, `limit_train_batches={trainer.limit_train_batches}`) that left the "
            "weights as they were. Look at `make_trainer`, `make_dataloader` and at what requires gradients."
        )
    broken = [name for name, value in after.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"Expected finite weights after training, got NaN or infinity in `{broken[0]}`.")


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and persistent buffers by clean name, on the CPU."""
    state = unwrapped(module).state_dict()
    named = {*dict(unwrapped(module).named_parameters()), *dict(unwrapped(module).named_buffers())}
    return {clean(name): value.detach().cpu().clone() for name, value in state.items() if name in named}


def seed_everything(seed: int) -> None:
    """What ``pytorch_lightning.seed_everything(seed)`` sets, so that the user can train the same model alone."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """A thousand Trainers do not tell a thousand times which accelerators there are."""
    names = ("lightning", "pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
    voices = [logging.getLogger(name) for name in names]
    levels = [voice.level for voice in voices]
    for voice in voices:
        voice.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for voice, level in zip(voices, levels, strict=True):
            voice.setLevel(level)
