"""One captured state of a fit."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.trajectory.files import read_verified


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint holds, all of it tensors on the CPU.

    ``parameters`` and ``buffers`` are keyed by the module's names (without ``_orig_mod.``), ``optimizer`` by parameter
    name and then by the optimizer's own key, ``random`` by generator. Of a Lightning ``.ckpt``, which does not tell
    parameters from buffers, both dicts hold all of ``state_dict``: pick by the module's names.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    random: dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A state on disk: read only when asked for, verified when read."""

    step: int
    epoch: int
    path: Path
    size: int = field(default=-1, repr=False)
    crc32: int = field(default=0, repr=False)

    def load(self) -> SavedState:
        """Read and verify the file.

        Raises:
            MissingEvidence: the file is gone, truncated or changed.
        """
        content = read_verified(self.path, self.size, self.crc32)
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return SavedState(**tensors)


def is_plain_sgd(group: dict[str, Any]) -> bool:
    """Whether a parameter group is one of ``torch.optim.SGD``: no other optimizer of torch has ``dampening``."""
    return "dampening" in group


def is_decoupled(entry: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether a parameter group's weight decay is a shrinkage of its own, as in AdamW, and no gradient of a penalty."""
    return entry.get("kind") == "AdamW" or bool(group.get("decoupled_weight_decay", False))
