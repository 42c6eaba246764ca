"""The state of the random generators: read, compared, packed into tensors. Nothing here draws from one."""

import ctypes
import math
import random
import struct
import sys
from typing import Any

import torch
from torch import Tensor

_MERSENNE_BYTES = 625 * 4  # 624 keys and the position
_python = getattr(random.seed, "__self__", None)  # the generator behind the functions of `random`


def _peek_python() -> bytes:
    """Python's generator as it lies in CPython's memory, position first: `getstate` makes 624 integers instead."""
    return ctypes.string_at(id(_python) + object.__basicsize__, _MERSENNE_BYTES)


def _can_peek() -> bool:
    if sys.implementation.name != "cpython" or getattr(type(_python), "__module__", None) != "random":
        return False
    *keys, position = random.getstate()[1]
    expected = b"".join(number.to_bytes(4, sys.byteorder) for number in (position, *keys))
    return type(_python).__basicsize__ >= object.__basicsize__ + _MERSENNE_BYTES and _peek_python() == expected


_PEEKS = _can_peek()


def read_generators(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a forward pass may draw from, cheaply: this runs twice a micro-batch."""
    states: dict[str, Any] = {"torch": torch.get_rng_state()}
    states["python"] = _peek_python() if _PEEKS else random.getstate()
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if (numpy := sys.modules.get("numpy")) is not None and hasattr(numpy.random, "get_bit_generator"):
        generator = numpy.random.get_bit_generator()
        if type(generator).__name__ == "MT19937":
            # `get_state` takes 80 µs, this takes 1; a cached second gaussian is not in it
            states["numpy"] = ctypes.string_at(generator.ctypes.state_address, _MERSENNE_BYTES)
    return states


def moved_since(before: dict[str, Any], device: torch.device) -> dict[str, bytes] | None:
    """The packed earlier states of the generators that were drawn from since; None if none was."""
    now = read_generators(device)
    moved = {
        name: state if isinstance(state, bytes) else _pack(state).numpy().tobytes()
        for name, state in before.items()
        if name in now and not _same(state, now[name])
    }
    return moved or None


def read_gaussians() -> dict[str, bytes]:
    """What is not in the states above: the second of a pair of normal numbers, kept until it is asked for; 0.1 ms."""
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
    """All generators as tensors, for a checkpoint: torch's as they are, Python's and numpy's as numbers."""
    states = {name: state for name, state in read_generators(device).items() if not isinstance(state, bytes)}
    packed = {name: _pack(state) for name, state in (states | {"python": random.getstate()}).items()}
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state(legacy=True)
        if isinstance(state, tuple):  # (name, keys, position, whether a gaussian is cached, that gaussian)
            packed["numpy"] = torch.tensor([*state[1].tolist(), *state[2:]], dtype=torch.float64)
    return packed


def _pack(state: Any) -> Tensor:
    if isinstance(state, Tensor):
        return state.clone()
    version, internal, gauss = state
    return torch.tensor([version, *internal, math.nan if gauss is None else gauss], dtype=torch.float64)


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
