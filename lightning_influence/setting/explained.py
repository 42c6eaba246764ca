"""Errors on queries that are not built like the training data, with the shapes of both."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.data.reading import CannotRead
from lightning_influence.trajectory.fit_data import name_of


@contextlib.contextmanager
def explained(examples: Examples, queries: Examples) -> Iterator[None]:
    """Turns any error inside into a ValueError that compares the queries' shapes with a training example's."""
    try:
        yield
    except CannotRead:
        raise
    except (RuntimeError, TypeError, IndexError, KeyError, ValueError, AttributeError) as error:
        example, query = _shown(examples.one(0)), _first(queries)
        raise ValueError(
            f"Expected queries that the module's loss accepts (a training example as a batch of one: {example}), got "
            f"{query}: {type(error).__name__}: {str(error).rstrip('.')}. "
            f"{_way_out(examples, queries, example == query)}"
        ) from error


def _way_out(examples: Examples, queries: Examples, alike: bool) -> str:
    names = [name_of(one.collate) for one in (queries, examples)]
    if names[0] == names[1]:
        if alike:
            return (
                "Both are built alike: look at the queries' values, and at `measurement=` or `loss=`, if there is one."
            )
        return "Pass `queries` that are built like the training data."
    return (
        f"The loader of `queries` collates with `{names[0]}`, that of the training data with `{names[1]}`. Pass the "
        "Dataset alone, which is then collated as the training data are, or a loader with that `collate_fn`."
    )


def _first(queries: Examples) -> str:
    try:
        return _shown(queries.one(0))
    except Exception:
        return "some that cannot be collated"


def _shown(batch: Any) -> str:
    """The structure, shapes and types of a batch."""
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {str(batch.dtype)[6:]}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shown(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return f"[{', '.join(map(_shown, batch))}]"
    return type(batch).__name__
