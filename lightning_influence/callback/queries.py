"""The `queries` of `Influence`: data, or the name of one of the Trainer's loaders."""

from typing import Any

from lightning_influence.attribution.data_arguments import loader_named
from lightning_influence.data.source import source_of
from lightning_influence.module.data_hooks import loaders_in

_LIGHTNING = ("pytorch_lightning.", "lightning.")


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
        raise ValueError(_missing(queries, len(loaders)))
    return loaders[position]


def missing_loader(queries: Any, trainer: Any) -> str | None:
    """What is missing for `queries` to name a loader; None where it is there, or may be once its hook is called.

    Hooks of the user are not called: they may draw random numbers.
    """
    if not isinstance(queries, str) or queries == "train":
        return None
    kind, position = loader_named(queries)
    found = _loaded(kind, trainer)
    if found is None:
        owner, name = _owner(trainer), f"{kind}_dataloader"
        hook = getattr(type(owner), name, None)
        if name in vars(owner) or (hook is not None and not hook.__module__.startswith(_LIGHTNING)):
            return None
    count = len(loaders_in(found))
    return _missing(queries, count) if position >= count else None


def _missing(queries: str, count: int) -> str:
    return (
        f"Expected the Trainer to have a loader for `queries={queries!r}`, got {count} of that kind. Pass a Dataset or "
        "DataLoader as `queries=`, or the loader to `trainer.fit`."
    )


def _owner(trainer: Any) -> Any:
    return trainer.datamodule if trainer.datamodule is not None else trainer.lightning_module


def _loaded(kind: str, trainer: Any) -> Any:
    """What the Trainer has loaded, or was passed; None where only a hook may have loaders."""
    found = getattr(trainer, "train_dataloader" if kind == "train" else f"{kind}_dataloaders")
    if found is None and kind == "val":  # as with `limit_val_batches=0`
        passed = getattr(getattr(trainer.fit_loop.epoch_loop.val_loop, "_data_source", None), "instance", None)
        found = None if hasattr(passed, "val_dataloader") else passed
    return found


def _loaders(kind: str, trainer: Any) -> list[Any]:
    found = _loaded(kind, trainer)
    if found is None:  # not loaded in this fit: create it as Lightning would
        try:
            found = getattr(_owner(trainer), f"{kind}_dataloader")()
        except Exception:
            found = None
    return loaders_in(found)
