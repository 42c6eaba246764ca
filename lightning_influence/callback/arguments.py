"""Checks of `Influence`'s arguments: each returns the argument in its final form, or raises."""

from collections.abc import Mapping, Sequence
from os import fspath
from typing import Any

from lightning_influence.attribution.data_arguments import loader_named
from lightning_influence.capture.schedule import Schedule
from lightning_influence.checks import check_flag, check_integer, check_path_like, one_of
from lightning_influence.data.lookalikes import check_no_lookalike
from lightning_influence.methods.method import Evidence, Method, how_to_write
from lightning_influence.methods.plain_loss import LABELS
from lightning_influence.wording import brief

_MEGABYTES = 5.0  # of an album, in each file of scores
_SHOWN = ("labels", "render", "columns", "normalization", "megabytes", "predictions")


def named_methods(methods: Any) -> dict[str, Any]:
    """Return the methods by name.

    Raises:
        ValueError: two methods of one class in a list.
        TypeError: neither a list nor a dict, or something in it that is not a method.
    """
    if isinstance(methods, Mapping):
        named = dict(methods)
    elif isinstance(methods, Sequence) and not isinstance(methods, str):
        named = {}
        for method in methods:
            name = method.name if isinstance(method, Method) else getattr(method, "__name__", type(method).__name__)
            if name in named:
                raise ValueError(
                    f"Expected one method of each class in a list, got two of {name!r}."
                    f" Name them in a dict: `methods={{'first': {name}(...), 'second': {name}(...)}}`."
                )
            named[name] = method
    else:
        one = isinstance(methods, type) and issubclass(methods, Method)
        shown = (
            f"[{methods.__name__ if one else methods}()]" if one or isinstance(methods, str) else f"[{brief(methods)}]"
        )
        shown = shown if one or isinstance(methods, (str, Method)) else "[TracInCP()]` or, to only record, `[]"
        raise TypeError(f"Expected `methods` to be a list or a dict of methods, got {brief(methods)}. Write `{shown}`.")
    for name, method in named.items():
        if not isinstance(method, Method):
            hint = how_to_write(method) or "Subclass `Method`."
            raise TypeError(
                f"Expected `methods` to hold methods such as `TracInCP()`, got {method!r} as {name!r}. {hint}"
            )
    return named


def methods_of_a_fit(methods: Any, labels: bool) -> dict[str, Method]:
    """Return the methods by name, all of which can run when a fit ends.

    Args:
        methods: a list or dict.
        labels: whether the list of suspect labels takes a name of its own.

    Raises:
        ValueError: one retrains models, two of one class are in a list, or one has the name of the list of labels.
        TypeError: see `named_methods`.
    """
    named = named_methods(methods)
    if labels and LABELS in named:
        raise ValueError(f"Expected no method named {LABELS!r} with `labels=True`, got one. Give it another name.")
    for name, method in named.items():
        if method.needs & Evidence.REFIT:
            raise ValueError(
                f"Expected `methods` that can run when a fit ends, got {name!r}, which retrains models. "
                "Run it afterwards: `Attributor(model, train=train_dataset, trajectory=influence.trajectory, "
                f"refit=Refit()).score({type(method).__name__}(...), queries=...)`."
            )
    return named


def checked_dirpath(dirpath: Any) -> str | None:
    """The folder as text; None: next to the logger's run.

    Raises:
        TypeError: something else than a path.
    """
    if dirpath is None:
        return None
    check_path_like("dirpath", dirpath, "Pass a folder to write to, or None: next to the logger's run.")
    return fspath(dirpath)


def checked_queries(queries: Any) -> Any:
    """Check what can be checked before there is a Trainer.

    Raises:
        ValueError: an unknown name of a loader.
        TypeError: neither data nor such a name.
    """
    if isinstance(queries, str):
        loader_named(queries)
    elif isinstance(queries, type):
        raise TypeError(
            f"Expected `queries` to be a Dataset, a DataLoader, 'train', 'val' or 'test', got the class "
            f"`{queries.__name__}`. Pass an object of it."
        )
    elif isinstance(queries, int) and not isinstance(queries, bool):
        check_no_lookalike(queries, "queries")
    elif queries is not None and not (hasattr(queries, "__getitem__") or hasattr(queries, "__iter__")):
        raise TypeError(f"Expected `queries` to be a Dataset, a DataLoader, 'train', 'val' or 'test', got {queries!r}.")
    return queries


def check_flags(**flags: Any) -> None:
    """Raises TypeError unless each is True or False."""
    for name, flag in flags.items():
        if name == "labels" and not isinstance(flag, bool):
            raise TypeError(
                f"Expected `labels` to be True or False, got {flag!r}. Names of classes go to `report(labels=)` or "
                "`album={'labels': ...}`."
            )
        check_flag(name, flag)


def album_options(album: bool | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Scores.save` with which it keeps what examples look like; none for False.

    Raises:
        TypeError: neither True, False nor a dict.
        ValueError: an unknown argument.
    """
    if not isinstance(album, Mapping):
        check_flag("album", album)
        return {"megabytes": _MEGABYTES} if album else {}
    unknown = sorted(set(map(str, album)) - set(_SHOWN))
    if unknown:
        raise ValueError(f"Expected `album` to have arguments of `Scores.save` ({', '.join(_SHOWN)}), got {unknown!r}.")
    return {"megabytes": _MEGABYTES, **album}


def schedule_of(
    every_n_epochs: Any, every_n_train_steps: Any, keep_last: Any, keep: str, methods: Mapping[str, Method]
) -> Schedule:
    """Return the checkpoint schedule; every epoch by default.

    Raises:
        ValueError: both arguments are given, one is not an integer of at least 0, or ``keep`` is another word.
    """
    check_integer("keep_last", keep_last, optional=True)
    one_of("keep", keep, ("all", "needed"))
    kept = keep_last, keep == "all" or any(method.reads_optimizer for method in methods.values())
    check_integer("every_n_epochs", every_n_epochs, least=0, optional=True)
    check_integer("every_n_train_steps", every_n_train_steps, least=0, optional=True)
    if not every_n_train_steps:
        return Schedule(every_n_epochs or 0, 0, *kept)
    if every_n_epochs not in (None, 0, 1):  # 1 is the default, which `every_n_train_steps` replaces
        raise ValueError(
            "Expected `every_n_epochs` or `every_n_train_steps`, got both"
            f" ({every_n_epochs!r}, {every_n_train_steps!r}). Leave one of them out."
        )
    return Schedule(0, every_n_train_steps, *kept)


def patterns_of(parameters: str | Sequence[str] | None) -> list[str] | None:
    """Return patterns over parameter names as a list, or None.

    Raises:
        ValueError: no patterns, or patterns that are not strings.
    """
    if parameters is None:
        return None
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"Expected `parameters` to hold patterns such as 'head.*', got {parameters!r}.")
    return patterns
