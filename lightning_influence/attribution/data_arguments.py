"""What the attributor's arguments say about data: a Dataset, a loader, or a DataModule that has them."""

from typing import Any

from lightning_influence.data.source import Source, source_of
from lightning_influence.module.data_hooks import SetUpDataModule
from lightning_influence.module.trainer_state import detached_trainer
from lightning_influence.trajectory import Trajectory
from lightning_influence.wording import counted


def datamodule_of(datamodule: Any, module: Any, trainer: Any) -> SetUpDataModule | None:
    """The DataModule that was passed, or the Trainer's.

    Raises:
        TypeError: it has no ``setup`` and ``train_dataloader``.
    """
    found = datamodule if datamodule is not None else getattr(trainer, "datamodule", None)
    if found is None:
        return None
    if isinstance(found, type) or not (hasattr(found, "setup") and hasattr(found, "train_dataloader")):
        raise TypeError(
            f"Expected `datamodule` to be a LightningDataModule, got {found!r}. Pass an instance, or a loader as "
            "`train=`."
        )
    return SetUpDataModule(found, trainer if trainer is not None else detached_trainer(module))


def training_source(train: Any, datamodule: SetUpDataModule | None, trajectory: Trajectory | None) -> Source:
    """The training data that were passed, or the DataModule's, of as many examples as were trained on.

    Raises:
        TypeError: see ``_training_source``.
        ValueError: see ``_training_source``; data of another length than in the fit.
    """
    found = _training_source(train, datamodule)
    known = None if trajectory is None else trajectory.dataset_size
    if known not in (None, len(found.dataset)):
        raise ValueError(
            f"Expected `train` to have the {known} examples of the dataset that was trained on, got "
            f"{len(found.dataset)}. Pass that dataset (an un-augmented one of equal length is fine)."
        )
    return found


def _training_source(train: Any, datamodule: SetUpDataModule | None) -> Source:
    """The training data that were passed, or the DataModule's.

    A Dataset that is passed beside a DataModule is collated by the loader of that.

    Raises:
        TypeError: neither was passed; data without indexed examples.
        ValueError: the DataModule has several training loaders, or none.
    """
    if datamodule is None:
        if train is None:
            raise TypeError(
                "Expected `train` to be the training Dataset or DataLoader, got None. Pass one of them, or "
                "`datamodule=`."
            )
        return source_of(train, "train")
    if train is not None:
        return source_of(train, "train", like=None if hasattr(train, "collate_fn") else _source_or_none(datamodule))
    loaders = datamodule.loaders("train")
    if len(loaders) > 1:
        raise ValueError(
            f"Expected a DataModule with one training loader, got {len(loaders)}. Pass the one that is meant as "
            "`train=`."
        )
    return source_of(loaders[0], "train")


def _source_or_none(datamodule: SetUpDataModule) -> Source | None:
    """The DataModule's training data, where it has one loader of indexed examples."""
    try:
        return _training_source(None, datamodule)
    except (TypeError, ValueError):
        return None


def queried(queries: Any, train: Source, datamodule: SetUpDataModule | None, name: str = "queries") -> Source:
    """The queries: data, "train", or a name as for ``_named``; a Dataset is collated as the training data are.

    Error messages have the ``name`` of the argument.

    Raises:
        TypeError: see ``source_of``.
        ValueError: empty data; there is no such loader.
    """
    if isinstance(queries, str) and queries == "train":
        return train
    return source_of(_named(queries, datamodule, name) if isinstance(queries, str) else queries, name, like=train)


def described(module: Any, train: Source, trajectory: Trajectory | None) -> str:
    """What an attributor asks about: the module, the training data and the fit."""
    of = f"{type(module).__name__} and {counted(len(train.dataset), 'training example')}"
    fit = "  no trajectory: the module's present weights" if trajectory is None else f"  {trajectory}"
    return f"Attributor of {of}\n{fit}"


def _named(name: str, datamodule: SetUpDataModule | None, argument: str) -> Any:
    """The DataModule's loader ``"val"`` or ``"test"``, or ``"val:1"`` for the second of several.

    Raises:
        ValueError: there is no such loader.
    """
    kind, position = loader_named(name, argument)
    if datamodule is None:
        raise ValueError(
            f"Expected `{argument}` to be a Dataset, a DataLoader or 'train', got {name!r}. Names of other loaders "
            "work with `Attributor(datamodule=)`, and in `Influence(queries=)`."
        )
    loaders = datamodule.loaders(kind)
    if position >= len(loaders):
        raise ValueError(
            f"Expected `{argument}` to name one of {counted(len(loaders), 'loader')}, got {name!r}. Count from 0."
        )
    return loaders[position]


def loader_named(name: str, argument: str = "queries") -> tuple[str, int]:
    """The kind of loader that a word for queries names, and which of several: ``("val", 1)`` for ``"val:1"``.

    Raises:
        ValueError: it names none.
    """
    kind, _, number = name.partition(":")
    if kind not in ("val", "test", "train") or (":" in name and not number.isdigit()):
        raise ValueError(
            f"Expected `{argument}` to be a Dataset, a DataLoader, 'train', 'val', 'test' or such as 'val:1', got "
            f"{name!r}. Pass data, or one of these names."
        )
    return kind, int(number or 0)
