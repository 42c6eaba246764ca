"""The `queries` of `Influence`: data, or the name of one of the Trainer's loaders."""

from typing import Any

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_influence.data.source import source_of


def check_queries(queries: Any) -> None:
    """Raise before the fit, rather than after it, for data that cannot be scored."""
    if queries is not None and not isinstance(queries, str):
        source_of(queries, "queries")


def resolve_queries(queries: Any, trainer: Any) -> Any:
    """Return the loader that `queries` names, or `queries` itself where it is data.

    Raises:
        ValueError: the Trainer has no such loader.
    """
    if not isinstance(queries, str) or queries == "train":
        return queries
    kind, _, number = queries.partition(":")
    loaders = _loaders(kind, trainer)
    position = int(number or 0)
    if position >= len(loaders):
        raise ValueError(
            f"Expected the Trainer to have a loader for `queries={queries!r}`, got {len(loaders)} of that kind. "
            "Pass a Dataset or DataLoader instead."
        )
    return loaders[position]


def _loaders(kind: str, trainer: Any) -> list[Any]:
    found = trainer.val_dataloaders if kind == "val" else trainer.test_dataloaders
    if found is None:  # not loaded in this fit: create it as Lightning would
        owner = trainer.datamodule if trainer.datamodule is not None else trainer.lightning_module
        try:
            found = getattr(owner, f"{kind}_dataloader")()
        except Exception:
            found = None
    leaves = tree_leaves(found, is_leaf=lambda x: isinstance(x, DataLoader))
    return [loader for loader in leaves if loader is not None]
