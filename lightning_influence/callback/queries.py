"""The `queries` of `Influence`: data, or the name of one of the Trainer's loaders."""

from typing import Any

from lightning_influence.attribution.data_arguments import loader_named
from lightning_influence.data.source import source_of
from lightning_influence.module.data_hooks import loaders_in


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
    kind, position = loader_named(queries)
    loaders = _loaders(kind, trainer)
    if position >= len(loaders):
        raise ValueError(
            f"Expected the Trainer to have a loader for `queries={queries!r}`, got {len(loaders)} of that kind. "
            "Pass a Dataset or DataLoader instead."
        )
    return loaders[position]


def _loaders(kind: str, trainer: Any) -> list[Any]:
    found = getattr(trainer, "train_dataloader" if kind == "train" else f"{kind}_dataloaders")
    if found is None:  # not loaded in this fit: create it as Lightning would
        owner = trainer.datamodule if trainer.datamodule is not None else trainer.lightning_module
        try:
            found = getattr(owner, f"{kind}_dataloader")()
        except Exception:
            found = None
    return loaders_in(found)
