"""The state of the random generators that reading an example may use."""

import random
import sys
from typing import Any

import torch


def random_state() -> tuple[Any, ...]:
    """The states of torch's, Python's and, where it is loaded, NumPy's generator."""
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1:3] if numpy else None


def same_state(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether no generator was used in between."""
    numpy_same = before[2] is None or (before[2][1] == after[2][1] and bool((before[2][0] == after[2][0]).all()))
    return torch.equal(before[0], after[0]) and before[1] == after[1] and numpy_same
