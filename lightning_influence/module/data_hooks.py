"""What a LightningDataModule does besides holding loaders: its hooks on the way of a batch to ``training_step``."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.module.snapshot import holding, restoring
from lightning_influence.types import LIBRARIES, Batch

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""Lightning's hooks between the loader and ``training_step``."""

_SETUP_STAGES = {"train": "fit", "val": "fit", "test": "test", "predict": "predict"}


class SetUpDataModule:
    """A LightningDataModule that is prepared as the Trainer prepares it, when its loaders are first wanted.

    Args:
        datamodule: the LightningDataModule.
        trainer: attached to it where it has none, while it is prepared.
    """

    def __init__(self, datamodule: Any, trainer: Any) -> None:
        self.datamodule, self._trainer = datamodule, trainer
        self._stages: set[str] = set()

    def loaders(self, kind: str) -> list[Any]:
        """Its loaders for ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: it has none of that kind.
        """
        with restoring([self.datamodule] if hasattr(self.datamodule, "trainer") else [], "trainer"):
            return self._loaders(kind)

    def _loaders(self, kind: str) -> list[Any]:
        fitted = getattr(self.datamodule, "trainer", None)
        if kind == "train" and (loader := getattr(fitted, "train_dataloader", None)) is not None:
            return loaders_in(loader)  # set up by that Trainer: to do it again may split the data in another way
        if fitted is None and self._trainer is not None:
            self.datamodule.trainer = self._trainer
        stage, make = _SETUP_STAGES[kind], f"{kind}_dataloader"
        with isolated_random_state():  # it may split its data at random
            if not self._stages and fitted is None:
                self.datamodule.prepare_data()
            is_set_up = stage == "fit" and getattr(fitted, "train_dataloader", None) is not None
            if stage not in self._stages and not is_set_up:
                self.datamodule.setup(stage)
            self._stages.add(stage)
            found = loaders_in(getattr(self.datamodule, make)()) if overrides(self.datamodule, make) else []
        if not found:
            raise ValueError(
                f"Expected `{type(self.datamodule).__name__}` to have a `{make}`, got none. Pass a Dataset or a "
                "DataLoader instead."
            )
        return found


def transferred(batch: Batch, module: Any, datamodule: Any, device: torch.device) -> Batch:
    """The batch after the three batch-transfer hooks, each that of a DataModule which has one, else the module's.

    Args:
        batch: as the loader gives it.
        module: the LightningModule.
        datamodule: None: that of the module's Trainer.
        device: where the batch is moved.
    """
    trainer = module._trainer
    # A Trainer that has never run does not know whose hooks to call.
    new = trainer is not None and getattr(trainer._data_connector, "_datahook_selector", True) is None
    if not new and datamodule is None:
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0)

    def owner(hook: str) -> Any:
        return datamodule if overrides(datamodule, hook) else module

    batch = owner("on_before_batch_transfer").on_before_batch_transfer(batch, 0)
    batch = owner("transfer_batch_to_device").transfer_batch_to_device(batch, device, 0)
    return owner("on_after_batch_transfer").on_after_batch_transfer(batch, 0)


def hooks_of(owners: Sequence[Any]) -> dict[str, str]:
    """The hooks of ``HOOKS`` that one of these objects overrides, with its class; the first one counts."""
    found: dict[str, str] = {}
    for owner in owners:
        for hook in HOOKS:
            if overrides(owner, hook):
                found.setdefault(hook, type(owner).__name__)
    return found


def overrides(owner: Any, hook: str) -> bool:
    """Whether a user's class, none of the libraries', or the object itself brings a hook of its own.

    Args:
        owner: a LightningModule, DataModule, Callback, plugin, or its class; None brings none.
        hook: the method's name.
    """
    cls = owner if isinstance(owner, type) else type(owner)
    if cls is not owner and hook in getattr(owner, "__dict__", {}):
        return True
    definer = next((each for each in cls.__mro__ if hook in vars(each)), None)
    return owner is not None and definer is not None and definer.__module__.partition(".")[0] not in LIBRARIES


@contextlib.contextmanager
def attached(datamodule: Any, module: Any) -> Iterator[None]:
    """Let the DataModule's hooks see the Trainer that the module sees, and the step its ``trainer.datamodule``."""
    trainer = getattr(module, "_trainer", None)
    owners = [datamodule] if trainer is not None and hasattr(datamodule, "trainer") else []
    without: list[Any] = [trainer] if getattr(trainer, "datamodule", datamodule) is None else []
    with holding(owners, "trainer", trainer), holding(without, "datamodule", datamodule):
        yield


def loaders_in(found: Any) -> list[Any]:
    """What a DataModule or Trainer has as loaders, in any container, one by one."""
    leaves = torch.utils._pytree.tree_leaves(found, is_leaf=lambda node: isinstance(node, DataLoader))
    return [loader for loader in leaves if loader is not None]
