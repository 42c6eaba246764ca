"""The names of types that the whole package shares, and the one exception of its own."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_leaves

Batch: TypeAlias = Any
"""Whatever the user's ``collate_fn`` returns and ``training_step`` accepts."""

LABELS = ("label", "labels", "y", "target", "targets", "class")
"""Names under which the dicts of a dataset usually hold the label."""


class MissingEvidence(RuntimeError):
    """A method needs something that this fit did not capture; the message says what and how to get it."""


def bytes_in(batch: Any) -> int:
    """Of all tensors in a batch, or in any nest of containers."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(batch) if isinstance(x, Tensor))


def labels_in(batch: Any) -> Any:
    """The labels of a batch, or the label of an example: its second part, or its entry of a usual name; else None.

    Example:
        >>> labels_in(("image", 3)), labels_in({"text": "words", "target": 3}), labels_in(["image"])
        (3, 3, None)
    """
    if isinstance(batch, Mapping):
        return next((batch[name] for name in LABELS if name in batch), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def clean(name: str) -> str:
    """A parameter's or module's name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "")


def foreign(leaf: object) -> bool:
    """Whether part of a batch is somebody's own class that moves itself between devices, as graphs do."""
    return hasattr(leaf, "to") and not isinstance(leaf, Tensor)
