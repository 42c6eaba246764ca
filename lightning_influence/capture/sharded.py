"""Reads the state of a fit for its checkpoints: from rank 0, or from all processes where they share the weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_influence.capture.places import CannotRecord, shards_weights
from lightning_influence.capture.states import copied, gather_state
from lightning_influence.module.layers import sharded_parts


class States:
    """The states of a fit of which rank 0 has everything.

    Args:
        trainer: of the fit.
        module: the LightningModule.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self._trainer, self._module = trainer, module
        self._remembered: list[tuple[int, int]] | None = None

    @property
    def read_here(self) -> bool:
        """Whether this process takes part in reading."""
        return bool(self._trainer.is_global_zero)

    def read(self, whole: bool = True) -> dict[str, dict]:
        """The present state on the CPU; not ``whole``: without the optimizer's."""
        return gather_state(self._trainer, self._module, whole=whole)

    def leave(self, why: str) -> None:
        """This process reads no more states, and nobody waits for it."""

    def remember(self) -> None:
        """Remember the present weights, which another callback may change at the end of the fit."""
        self._remembered = self._fingerprint()

    @property
    def changed(self) -> bool:
        """Whether any weight was modified or replaced since."""
        return self._remembered not in (None, self._fingerprint())

    def _fingerprint(self) -> list[tuple[int, int]] | None:
        return [(0 if is_lazy(p) else p.data_ptr(), p._version) for p in self._module.parameters()]


class ShardedStates(States):
    """The states of a fit whose processes share the weights: all of them gather each for rank 0.

    An error in one process alone ends its recording while the fit goes on. The others would wait for it in the next
    exchange, so before each they meet in the store that connects the processes, where one that will not come leaves
    word.

    Args:
        trainer: of the fit.
        module: the LightningModule.
        run_dir: of the fit, the same in all processes.
    """

    def __init__(self, trainer: Any, module: Any, run_dir: Path) -> None:
        super().__init__(trainer, module)
        self._place = f"lightning_influence{run_dir}"
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._met, self._left = 0, False

    @property
    def read_here(self) -> bool:
        """Until this process leaves."""
        return not self._left

    def read(self, whole: bool = True) -> dict[str, dict]:
        """That of all processes in rank 0, one without values elsewhere.

        Raises:
            CannotRecord: a process no longer records the fit.
        """
        self._meet()
        for part in sharded_parts(self._module):
            part.reshard()  # a forward pass leaves whole weights, perhaps rounded, in place of its shards
        return gather_state(self._trainer, self._module, self._joined, whole)

    def leave(self, why: str) -> None:
        """Tell the other processes."""
        self._left = True
        self._store.set(f"{self._place}/{self._met + 1}", why)

    def _fingerprint(self) -> None:
        """Not known: weights are replaced by their shards and back."""

    def _meet(self) -> None:
        self._met += 1
        here = f"{self._place}/{self._met}"
        if self._store.add(f"{here}/count", 1) == self._trainer.world_size:
            self._store.set(here, "")
        if why := self._store.get(here).decode():
            raise CannotRecord(why)

    def _joined(self, value: Tensor | float) -> Tensor:
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        return copied(value) if self._trainer.is_global_zero else torch.empty(0)


def states_of(trainer: Any, module: Any, run_dir: Path) -> States:
    """The states of a fit, by its Trainer's strategy."""
    if shards_weights(trainer.strategy):
        return ShardedStates(trainer, module, run_dir)
    return States(trainer, module)
