"""The names of types that the whole package shares, and the one exception of its own."""

from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_leaves

Batch: TypeAlias = Any
"""Whatever the user's ``collate_fn`` returns and ``training_step`` accepts."""


class MissingEvidence(RuntimeError):
    """A method needs something that this fit did not capture; the message says what and how to get it."""


def bytes_in(batch: Any) -> int:
    """Of all tensors in a batch, or in any nest of containers."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(batch) if isinstance(x, Tensor))


def clean(name: str) -> str:
    """A parameter's or module's name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "")


def foreign(leaf: object) -> bool:
    """Whether part of a batch is somebody's own class that moves itself between devices, as graphs do."""
    return hasattr(leaf, "to") and not isinstance(leaf, Tensor)
