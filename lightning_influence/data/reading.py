"""Reads and collates examples; errors of a dataset or a collate function name the examples."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_influence.data.lists import ReadRows
from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.types import Batch

# How many examples are looked through for others that a collate function drops, once it has dropped one.
_SEARCHED = 256
_OPENED = (
    "The loader has a `worker_init_fn`: what it opens exists in its workers only. Open it in `__getitem__` when it is"
    " first needed, or pass `Attributor(train=)` a dataset that is open here."
)


class CannotRead(ValueError):
    """A dataset or its collate function gives no batch of an example. The message names it, with the way out."""

    def __init__(self, message: str) -> None:
        # a DataLoader's worker hands over its traceback as text, at the end of which is this message
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def read_item(dataset: Any, example: int, name: str, opened: bool = False) -> Any:
    """An example.

    Args:
        dataset: map-style.
        example: its index.
        name: of the argument that the dataset was passed as.
        opened: whether its loader has a ``worker_init_fn``, in whose absence reading may fail.

    Raises:
        CannotRead: the dataset raised an error.
    """
    try:
        return dataset[example]
    except CannotRead:
        raise
    except KeyError as error:
        if error.args != (example,):
            raise _unreadable(dataset, example, name, opened, error) from error
        raise CannotRead(
            f"Expected {type(dataset).__name__} to have the indices 0, 1, 2 ..., got KeyError: {error} for {example}: "
            "its keys are others, such as strings that a sampler gives. Wrap it in a Dataset whose `__getitem__` takes "
            "positions, in a list of the keys, and pass that as `train=` (or `queries`)."
        ) from error
    except Exception as error:
        raise _unreadable(dataset, example, name, opened, error) from error


def _unreadable(dataset: Any, example: int, name: str, opened: bool, error: Exception) -> CannotRead:
    whole = "or leave it out: `Subset(queries, ids)`" if name == "queries" else "as scores need every example"
    way = _OPENED if opened else f"Make it readable again, {whole}."
    return CannotRead(
        f"Expected `{name}[{example}]` to be an example, got {type(error).__name__} from {type(dataset).__name__}: "
        f"{str(error) or 'no message'}. {way}"
    )


def collated(
    collate: Callable[[list[Any]], Batch], items: list[Any], ids: Sequence[int], dataset: Any, name: str
) -> Batch:
    """The batch of some examples.

    Args:
        collate: the loader's collate function.
        items: the examples.
        ids: their indices.
        dataset: whose examples they are.
        name: of the argument that the dataset was passed as.

    Raises:
        CannotRead: the collate function drops all of them.
    """
    try:
        batch = collate(items)
    except Exception as error:
        _refuse_dropped(collate, items, ids, dataset, name, error)
        raise
    if batch is None or _rows(batch) < len(items):
        _refuse_dropped(collate, items, ids, dataset, name)
    return batch


def _rows(batch: Batch) -> float:
    """The common length of all tensors of a batch, infinite where there is none."""
    lengths = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim > 0}
    return lengths.pop() if len(lengths) == 1 else math.inf


def _refuse_dropped(
    collate: Callable[[list[Any]], Batch],
    items: list[Any],
    ids: Sequence[int],
    dataset: Any,
    name: str,
    error: Exception | None = None,
) -> None:
    """Raise CannotRead where the collate function drops one of these examples: it makes of it what it makes of none."""
    if isinstance(collate, ReadRows):
        return
    with isolated_random_state():
        if error is None and not _counts_examples(collate, items[0]):
            return
        nothing = _nothing(collate, [])
        made = [_nothing(collate, [item]) for item in items] if nothing is not None else []
        if nothing not in made or nothing is None:
            return
        others = [i for i in range(min(len(dataset), _SEARCHED)) if i not in ids]
        made += [_nothing(collate, [read_item(dataset, i, name)]) for i in others]
    found = zip([*ids, *others], made, strict=False)  # two copies of an example have one id
    dropped = sorted(i for i, outcome in found if outcome == nothing)
    if all(outcome == nothing for outcome in made):  # it fails on every batch of one
        return
    shown = ", ".join(map(str, dropped[:8])) + " ..." * (len(dropped) > 8)
    shown = f"{'example' if len(dropped) == 1 else 'examples'} {shown}"
    way = "Pass `Subset(queries, kept_ids)` of the others."
    if name != "queries":
        way = "Leave them out before the fit: train on `Subset(dataset, kept_ids)`, of which nothing is dropped."
    raise CannotRead(
        f"Expected the `collate_fn` of `{name}` to keep every example, got one that drops {shown}. {way}"
    ) from error


def _counts_examples(collate: Callable[[list[Any]], Batch], single: Any) -> bool:
    """Whether the common length of a batch's tensors may be its number of examples, rather than of time steps."""
    try:
        batch = collate([single])
    except Exception:
        return True
    return batch is None or _rows(batch) <= 1


def _nothing(collate: Callable[[list[Any]], Batch], items: list[Any]) -> tuple[str, str] | None:
    """What a collate function makes of too few examples: an error, None or empty tensors; None for a batch of some."""
    try:
        batch = collate(items)
    except Exception as error:
        return type(error).__name__, str(error)
    return ("", "") if batch is None or _rows(batch) == 0 else None
