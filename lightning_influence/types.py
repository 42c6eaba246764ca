"""Names and small helpers shared by the whole package, and its one exception type."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset

Batch: TypeAlias = Any
"""Whatever the user's ``collate_fn`` returns and ``training_step`` accepts."""

LABELS = ("label", "labels", "y", "target", "targets", "class")
"""Names under which the dicts of a dataset usually hold the label."""


LIBRARIES = frozenset(
    {
        "pytorch_lightning",
        "lightning",
        "lightning_fabric",
        "lightning_influence",
        "lightning_utilities",
        "torch",
        "torchmetrics",
    }
)
"""Top-level packages whose code is not the user's."""


def is_own(value: Any) -> bool:
    """Whether a class or function is a user's."""
    return str(getattr(value, "__module__", None)).partition(".")[0] not in LIBRARIES | {"builtins", "typing", "abc"}


class MissingEvidence(RuntimeError):
    """A method needs something that this fit did not capture; the message says what is missing and how to get it."""


def bytes_in(batch: Any) -> int:
    """Total size in bytes of the tensors in a batch, or in any nested container."""
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors_in(batch)}.values())


def leaves_in(batch: Any, depth: int = 8) -> list[Any]:
    """The parts of a batch, with those of the mappings, dataclasses and other objects in it, each opened once."""
    found, level, opened = [], [batch], set()
    for deeper in (*[True] * depth, False):
        below = []
        for leaf in tree_leaves(level):
            held = _held(leaf) if deeper else None
            if not held:
                found.append(leaf)
            elif id(leaf) not in opened:
                opened.add(id(leaf))
                below.append(held)
        level = below
    return found


def _held(leaf: Any) -> dict[str, Any]:
    """What is in a mapping or in an object, in slots too; empty for tensors, classes and others without anything."""
    if isinstance(leaf, (Tensor, type)):
        return {}
    if isinstance(leaf, Mapping):
        return dict(leaf)
    found = dict(getattr(leaf, "__dict__", {}))
    for kind in type(leaf).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(leaf, name):
                found[name] = getattr(leaf, name)
    return found


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors among them."""
    return [leaf for leaf in leaves_in(batch) if isinstance(leaf, Tensor)]


def labels_in(batch: Any) -> Any:
    """The labels of a batch, or the label of an example.

    The second part of a tuple or list, or the entry of a dict under the first of ``LABELS`` that it has; else None.

    Example:
        >>> labels_in(("image", 3)), labels_in({"text": "words", "target": 3}), labels_in(["image"])
        (3, 3, None)
    """
    if isinstance(batch, Mapping):
        return next((batch[name] for name in LABELS if name in batch), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def is_table(data: Any) -> bool:
    """Whether data are a DataFrame or the like, which is indexed by columns and not by examples."""
    return hasattr(data, "iloc") and hasattr(data, "columns")


def base_indices(dataset: Any) -> Tensor | None:
    """[example]: indices into the dataset underneath nested ``Subset``s; None if it is no ``Subset``."""
    ids = None
    while isinstance(dataset, Subset):
        indices = torch.as_tensor(list(dataset.indices), dtype=torch.int64)
        ids = indices if ids is None else indices[ids]
        dataset = dataset.dataset
    return ids


def clean(name: str) -> str:
    """The name of a parameter or module without the prefix that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "")


def foreign(leaf: object) -> bool:
    """Whether part of a batch is a third-party class that moves itself between devices, such as a graph."""
    return hasattr(leaf, "to") and not isinstance(leaf, Tensor)


def writable(leaf: object) -> bool:
    """Whether a step may write into part of a batch and leave no trace: what is no tensor, such as an array."""
    if isinstance(leaf, (Tensor, type)):
        return False
    if is_dataclass(leaf):  # Lightning makes another one of it
        return any(map(writable, tree_leaves(_held(leaf))))
    return foreign(leaf) or hasattr(leaf, "__setitem__") or bool(getattr(leaf, "__dict__", None))
