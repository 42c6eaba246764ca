"""Ids of training examples and queries: their checks, where they are found, and how they are written."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class BaseIds(NamedTuple):
    """Indices into the datasets underneath `Subset` and `random_split`: [train] and [query] int64."""

    train_ids: Tensor
    query_ids: Tensor


def ascending(name: str, ids: Tensor) -> Tensor:
    """The ids on the CPU.

    Raises:
        TypeError: They are not an int64 vector.
        ValueError: There are none, or they are not ascending and distinct.
    """
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise TypeError(f"Expected `{name}` to be an int64 vector, got {ids.dtype} of shape {list(ids.shape)}.")
    ids = ids.detach().cpu()
    if not ids.numel():
        raise ValueError(f"Expected `{name}` to hold at least one id, got none. Is the dataset empty?")
    falls = (ids.diff() <= 0).nonzero().flatten()
    if falls.numel():
        at = int(falls[0])
        raise ValueError(
            f"Expected `{name}` to be ascending and distinct, got {int(ids[at])} before {int(ids[at + 1])}. "
            "Sort the ids, and the scores with them."
        )
    return ids


def base_of(name: str, base: Tensor | None, ids: Tensor) -> Tensor | None:
    """The base ids on the CPU, or None where they equal the ids.

    Raises:
        ValueError: They are not int64, or of another shape than the ids.
    """
    if base is None:
        return None
    if base.dtype != torch.int64 or base.shape != ids.shape:
        raise ValueError(
            f"Expected base ids for `{name}` to be {ids.numel()} int64 numbers, "
            f"got {base.dtype} of shape {list(base.shape)}."
        )
    base = base.detach().cpu()
    return None if torch.equal(base, ids) else base


def whole_numbers(ids: Any, name: str = "ids") -> Tensor:
    """Ids as an int64 vector. Fractions are not truncated, and a mask is refused: its True would be the id 1.

    Raises:
        TypeError: They are not whole numbers.
    """
    try:
        found = torch.as_tensor(ids).flatten().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"Expected `{name}` to be whole numbers, got {ids!r}. Pass a list such as `[3, 17]`.") from None
    if found.numel() and (found.dtype is torch.bool or found.is_floating_point() or found.is_complex()):
        raise TypeError(f"Expected `{name}` to be whole numbers, got {found.dtype}. For a mask, pass `mask.nonzero()`.")
    return found.to(torch.int64)


def places(known: Tensor, wanted: Tensor, name: str) -> Tensor:
    """Positions of the wanted ids among the known ones, which are ascending.

    Raises:
        ValueError: An id is unknown.
    """
    at = torch.searchsorted(known, wanted).clamp(max=known.numel() - 1)
    missing = wanted[known[at] != wanted]
    if missing.numel():
        raise ValueError(
            f"Expected `{name}` to be among the {known.numel()} ids {int(known[0])} to {int(known[-1])} that were "
            f"scored, got {missing[:5].tolist()!r}."
        )
    return at


def name_of(one: int, ids: Tensor, base: Tensor | None) -> str:
    """The id as text, with the base id where there is one."""
    if base is None:
        return str(one)
    return f"{one} (base {int(base[int(torch.searchsorted(ids, one))])})"
