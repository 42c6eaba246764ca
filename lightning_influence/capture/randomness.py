"""The state of the random generators: read, compared, packed into tensors. Nothing here draws from one."""

import math
import random
import sys
from typing import Any

import torch
from torch import Tensor


def read_generators(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a forward pass may draw from."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if (numpy := sys.modules.get("numpy")) is not None:
        states["numpy"] = numpy.random.get_state(legacy=True)
    return states


def moved_since(before: dict[str, Any], device: torch.device) -> dict[str, bytes] | None:
    """The packed earlier states of the generators that were drawn from since; None if none was."""
    now = read_generators(device)
    moved = {
        name: pack(state).numpy().tobytes()
        for name, state in before.items()
        if name in now and not _same(state, now[name])
    }
    return moved or None


def pack(state: Any) -> Tensor:
    """One tensor for a generator's state, whichever generator it is."""
    if isinstance(state, Tensor):
        return state.clone()
    if state[0] == "MT19937":  # numpy: name, keys, position, whether a gaussian is cached, which
        return torch.tensor([*state[1].tolist(), *state[2:]], dtype=torch.float64)
    version, internal, gauss = state
    return torch.tensor([version, *internal, math.nan if gauss is None else gauss], dtype=torch.float64)


def gather_random(device: torch.device) -> dict[str, Tensor]:
    """All generators as tensors, for a checkpoint."""
    return {name: pack(state) for name, state in read_generators(device).items()}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if one[0] == "MT19937":
        return one[2:] == other[2:] and bool((one[1] == other[1]).all())
    return bool(one == other)
