"""The names of types that the whole package shares, and the one exception of its own."""

from typing import Any, TypeAlias

from torch import Tensor

Batch: TypeAlias = Any
"""Whatever the user's ``collate_fn`` returns and ``training_step`` accepts."""


class MissingEvidence(RuntimeError):
    """A method needs something that this fit did not capture; the message says what and how to get it."""


def foreign(leaf: object) -> bool:
    """Whether part of a batch is somebody's own class that moves itself between devices, as graphs do."""
    return hasattr(leaf, "to") and not isinstance(leaf, Tensor)
