"""The state of the random generators: read, compared, packed into tensors. Nothing here draws from one.

States are read twice per micro-batch, and twice more where examples are read in the same process. Reading those of
Python and numpy from memory takes less than 1 µs each. `random.getstate` takes 13 µs and `numpy.random.get_state` 40,
with which the cost of recording a step rises from 36 to 120 µs (one CPU core, without the loader's share).
"""

import ctypes
import math
import random
import struct
import sys
from typing import Any

import torch
from torch import Tensor

from lightning_influence.devices import rng_state
from lightning_influence.trajectory.files import ACCELERATOR

_MERSENNE_BYTES = 625 * 4  # 624 keys and the position
_python = getattr(random.seed, "__self__", None)  # the generator behind the functions of `random`


def _peek_python() -> bytes:
    """Python's generator as CPython stores it, position first."""
    return ctypes.string_at(id(_python) + object.__basicsize__, _MERSENNE_BYTES)


def _can_peek() -> bool:
    if sys.implementation.name != "cpython" or getattr(type(_python), "__module__", None) != "random":
        return False
    *keys, position = random.getstate()[1]  # what is read from memory must be this: the layout is not documented
    expected = b"".join(number.to_bytes(4, sys.byteorder) for number in (position, *keys))
    return type(_python).__basicsize__ >= object.__basicsize__ + _MERSENNE_BYTES and _peek_python() == expected


_PEEKS = _can_peek()


def read_generators(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator that a forward pass may use."""
    states: dict[str, Any] = {"torch": torch.get_rng_state()}
    states["python"] = _peek_python() if _PEEKS else random.getstate()
    if (state := rng_state(device)) is not None:
        states[ACCELERATOR] = state
    if (numpy := sys.modules.get("numpy")) is not None and hasattr(numpy.random, "get_bit_generator"):
        generator = numpy.random.get_bit_generator()
        if type(generator).__name__ == "MT19937":
            # a cached normal number is not part of it, see `read_gaussians`
            states["numpy"] = ctypes.string_at(generator.ctypes.state_address, _MERSENNE_BYTES)
    return states


def moved_since(before: dict[str, Any], device: torch.device) -> dict[str, bytes] | None:
    """Return the earlier states, packed, of the generators used since; None if none was."""
    now = read_generators(device)
    moved = {
        name: (f"{device.type}:".encode() if name == ACCELERATOR else b"")
        + (state if isinstance(state, bytes) else _pack(state).numpy().tobytes())
        for name, state in before.items()
        if name in now and not _same(state, now[name])
    }
    return moved or None


def read_gaussians() -> dict[str, bytes]:
    """Return the normal numbers that generators cache, which are drawn in pairs; takes 0.1 ms."""
    kept: dict[str, tuple[float, float]] = {}
    if _PEEKS:
        gauss = random.getstate()[2]
        kept["python"] = (0.0, 0.0) if gauss is None else (1.0, gauss)
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state(legacy=True)
        if isinstance(state, tuple):
            kept["numpy"] = float(state[3]), float(state[4])
    return {name: struct.pack("2d", *pair) for name, pair in kept.items()}


def gather_random(device: torch.device) -> dict[str, Tensor]:
    """Return the states of all generators as tensors, for a checkpoint."""
    states = {name: state for name, state in read_generators(device).items() if not isinstance(state, bytes)}
    packed = {name: _pack(state) for name, state in (states | {"python": random.getstate()}).items()}
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state(legacy=True)
        if isinstance(state, tuple):  # (name, keys, position, whether a normal number is cached, that number)
            packed["numpy"] = torch.tensor([*state[1].tolist(), *state[2:]], dtype=torch.float64)
    return packed


def _pack(state: Any) -> Tensor:
    if isinstance(state, Tensor):
        return state.clone()
    version, internal, gauss = state
    return torch.tensor([version, *internal, math.nan if gauss is None else gauss], dtype=torch.float64)


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
