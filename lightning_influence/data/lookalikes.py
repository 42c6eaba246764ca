"""What is passed in the place of a Dataset: one example, a batch, a table, or ids."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_influence.types import is_table


def check_no_lookalike(data: Any, name: str) -> None:
    """Raises TypeError for one example, a batch, a table or, of queries, ids in the place of a Dataset."""
    found = _ids(data) if name == "queries" else None
    if found is None and isinstance(data, (tuple, list)):
        found = _parts(data)
    elif found is None and isinstance(data, Mapping):
        found = _mapping(data)
    elif found is None and is_table(data):
        found = (
            f"a {type(data).__name__}, which is indexed by columns: its rows are `.iloc[i]`. Wrap it in a Dataset "
            "whose `__getitem__` returns one of them."
        )
    if found is not None:
        raise TypeError(f"Expected `{name}` to be a Dataset or a DataLoader, got {found}")


def _ids(data: Any) -> str | None:
    several = isinstance(data, (tuple, list))
    ids = list(data[:6]) if several else [data]
    if not ids or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        return None
    shown = repr(ids) if len(ids) <= 5 else f"[{', '.join(map(str, ids[:5]))}, ...]"
    return (
        f"{shown if several else data}, which looks like {'ids' if several else 'an id'}. Pass "
        f"`torch.utils.data.Subset(dataset, {shown})`; if these numbers are examples, wrap them in a Dataset."
    )


def _parts(data: tuple[Any, ...] | list[Any]) -> str | None:
    if isinstance(data, list) and len(data) > 8:
        return None
    unlike = len({(type(part), getattr(part, "ndim", None)) for part in data}) > 1
    if isinstance(data, tuple) and unlike:
        return (
            "a tuple of unlike parts, which looks like one example. Pass `[example]`, or "
            "`torch.utils.data.Subset(dataset, [7])`."
        )
    if unlike and all(isinstance(part, Tensor) for part in data):
        return "a list of unlike tensors, which looks like one batch or example. Pass the Dataset that it is from."
    return None


def _mapping(data: Mapping[Any, Any]) -> str | None:
    if not data or not all(isinstance(key, str) for key in data):
        return None
    first = next(iter(data))
    if all(isinstance(value, Dataset) or hasattr(value, "column_names") for value in data.values()):
        return f"a {type(data).__name__} of several datasets. Pass one of them, such as `[{first!r}]`."
    return (
        f"a {type(data).__name__} with the keys {', '.join(map(repr, list(data)[:4]))}, which looks like one "
        "example or batch. Pass `[example]`, or `torch.utils.data.Subset(dataset, [7])`."
    )
