"""A checkpoint: the weights and states of a fit after one optimizer step."""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.files.regular import check_regular
from lightning_influence.trajectory.files import read_verified


@dataclass(frozen=True)
class SavedState:
    """The content of a checkpoint, as tensors on the CPU.

    ``parameters`` and ``buffers`` are keyed by the module's names (without ``_orig_mod.``), ``optimizer`` by parameter
    name and then by the optimizer's own key, ``random`` by generator. A Lightning ``.ckpt`` does not distinguish
    parameters from buffers, so both dicts hold all of its ``state_dict``: select by the module's names.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    random: dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk; ``load`` reads it and verifies its size and checksum.

    It is ``whole`` unless the fit left out the optimizer's state, as `Influence(keep=)` may say.
    """

    step: int
    epoch: int
    path: Path
    size: int = field(default=-1, repr=False)
    crc32: int = field(default=0, repr=False)
    whole: bool = field(default=True, repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers together, by name."""
        state = self.load()
        return {**state.parameters, **state.buffers}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name, without reading their values; empty where the file cannot be read so."""
        with contextlib.suppress(Exception):  # what is wrong with the file, `load` says
            check_regular(self.path)
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            return {name: tuple(tensor.shape) for name, tensor in content["parameters"].items()}
        return {}

    def load(self) -> SavedState:
        """Read and verify the file.

        Raises:
            MissingEvidence: the file is missing, truncated or changed.
        """
        content = read_verified(self.path, self.size, self.crc32)
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return SavedState(**tensors)


@dataclass(frozen=True)
class BestFile:
    """The file that Lightning's ``ModelCheckpoint`` found best.

    Args:
        path: where it was when the fit ended.
        monitor: the metric; None: the newest file.
        step: optimizer steps before it; None where unknown.
        global_step: as the file has it; None where unknown.
        averaged: whether an averaging callback wrote its own weights into it.
    """

    path: str
    monitor: str | None = None
    step: int | None = None
    global_step: int | None = None
    averaged: bool = False


def is_plain_sgd(group: dict[str, Any]) -> bool:
    """Whether a parameter group belongs to ``torch.optim.SGD``, the only torch optimizer with ``dampening``."""
    return "dampening" in group


def is_decoupled(entry: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether a parameter group's weight decay shrinks the weights directly, as in AdamW, not by a gradient."""
    return entry.get("kind") == "AdamW" or bool(group.get("decoupled_weight_decay", False))
