"""The random states of torch, accelerators, NumPy and Python: restored afterwards, or seeded for one example."""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

from lightning_influence.devices import rng_states, seed_accelerators, set_rng_state


@contextlib.contextmanager
def isolated_random_state() -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python afterwards."""
    numpy = sys.modules.get("numpy")
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    of_accelerators = rng_states()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy is not None and states[2] is not None:
            numpy.random.set_state(states[2])
        for device, state in of_accelerators.items():
            set_rng_state(device, state)


def states_on_host() -> tuple[Any, ...]:
    """The states of the generators that reading an example may use, to be compared: torch's, Python's and NumPy's."""
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        (state[1].tobytes(), *state[2:]) if isinstance(state, tuple) else repr(state),
    )


def random_states() -> tuple[Any, ...]:
    """The states of all random generators, to be compared."""
    return *states_on_host(), {device: s.numpy().tobytes() for device, s in rng_states().items()}


def seed_for(example: int, *, seed: int = 0) -> None:
    """Seed torch, NumPy and Python for one example, so that two calls agree even with random transforms.

    Args:
        example: its id.
        seed: another one shows what depends on random numbers.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + (example + 1) * 0xD1B54A32D192ED03) % 2**63
    # Not `torch.manual_seed`: it queues a call with a stack trace for every kind of device that is absent (1 ms).
    torch.default_generator.manual_seed(mixed)
    seed_accelerators(mixed)
    random.seed(mixed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(mixed % 2**32)
