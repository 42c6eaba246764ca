"""Restores captured states of the random generators."""

import math
import random
import struct
import sys
from collections.abc import Mapping

import numpy
import torch

from lightning_influence.devices import set_rng_state
from lightning_influence.trajectory.files import ACCELERATOR

_WORDS = 625  # 624 keys and the position


def put_back(states: Mapping[str, bytes], device: torch.device) -> None:
    """Sets the generators that have a captured state; the others do not change.

    Args:
        states: of the generators that the forward pass or the reading of examples drew from.
        device: the module's; the state of another kind of accelerator is skipped.
    """
    if "torch" in states:
        torch.set_rng_state(_bytes(states["torch"]))
    kind, _, state = states.get(ACCELERATOR, b"").partition(b":")
    if kind.decode() == device.type:
        set_rng_state(device, _bytes(state))
    if "python" in states:
        random.setstate(_python(states["python"]))
    if "numpy" in states and sys.modules.get("numpy") is not None:
        state, (kept, gauss) = _split(states["numpy"])
        words = numpy.frombuffer(state, dtype=numpy.uint32)
        numpy.random.set_state(("MT19937", words[:-1], int(words[-1]), int(kept), gauss))


def _bytes(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _split(state: bytes) -> tuple[bytes, tuple[float, float]]:
    """The generator's words; whether it holds a normal number for the next call, and that number."""
    words, rest = state[: 4 * _WORDS], state[4 * _WORDS :]
    return words, struct.unpack("2d", rest) if rest else (0.0, 0.0)


def _python(state: bytes) -> tuple[int, tuple[int, ...], float | None]:
    if len(state) in (4 * _WORDS, 4 * _WORDS + 16):  # the layout in memory, position first
        state, (kept, gauss) = _split(state)
        position, *keys = numpy.frombuffer(state, dtype=numpy.uint32).tolist()
        return 3, (*keys, position), gauss if kept else None
    version, *internal, last = numpy.frombuffer(state, dtype=numpy.float64).tolist()
    return int(version), tuple(int(number) for number in internal), None if math.isnan(last) else last
