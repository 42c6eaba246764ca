"""Records which of the Trainer's attributes ``training_step`` reads, and what they are at each checkpoint."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_influence.module.trainer_reads import (
    NotPlain,
    as_json,
    is_of_the_process,
    own_value,
    set_class,
    watched_class,
)
from lightning_influence.types import LIBRARIES

# The module's and the Trainer's counters are set for each checkpoint; what these hold belongs to the process.
_NOT_RECORDED = frozenset({"global_step", "current_epoch", "logger", "loggers", "state", "profiler", "callbacks"})
_READ_AGAIN = "get_"


class TrainerReads:
    """Watches the fit's first batch: the Trainer, and what is read from it, get classes that note each read.

    Nothing else about them changes, and the classes are put back when the batch has its loss. Of the paths that were
    seen, the values are read again at each checkpoint.

    Args:
        trainer: of the fit.
        module: the LightningModule.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self._trainer, self._module = trainer, module
        self._read: dict[str, Callable[[], Any] | None] = {}
        self._first: dict[str, Any] = {}
        self._classes: list[tuple[Any, type]] = []
        self._paths: dict[int, tuple[str, Callable[[], Any]]] = {}
        self._patched: list[str] = []
        self._started = False
        self.watching = False

    def start(self) -> None:
        """Start watching, once; a compiled step is not watched, since it would be compiled differently."""
        if self._started or getattr(self._module, "_compiler_ctx", None) is not None:
            return
        self._started = self.watching = True
        self._watch(self._trainer, "", lambda: self._trainer)
        if self._module.automatic_optimization:
            self._patch("optimizers", "optimizers", lambda i: self._trainer.optimizers[i], "optimizers[{}]")
            self._patch(
                "lr_schedulers",
                "lr_scheduler_configs",
                lambda i: self._trainer.lr_scheduler_configs[i].scheduler,
                "lr_scheduler_configs[{}].scheduler",
            )

    def unwatch(self) -> None:
        """Put the classes back; harmless when repeated."""
        for owner, kind in reversed(self._classes):
            set_class(owner, kind)
        for name in self._patched:
            self._module.__dict__.pop(name, None)
        self._classes, self._paths, self._patched = [], {}, []

    def stop(self) -> None:
        """Watch no longer, once the first batch has been trained on; harmless when repeated."""
        self.unwatch()
        self.watching = False

    @property
    def first(self) -> dict[str, Any]:
        """What the first batch read, by path."""
        return dict(self._first)

    def now(self) -> dict[str, Any]:
        """The present values of what the first batch read."""
        values = {}
        for path, read in self._read.items():
            if read is None:
                values[path] = self._first[path]
                continue
            try:
                values[path] = as_json(read(), strict=False)
            except Exception:  # an attribute of the user's that is not always there
                values[path] = {"is": "unknown", "value": None}
        return values

    # ---- reads ----------------------------------------------------------------------------------------------------

    def _watch(self, owner: Any, path: str, again: Callable[[], Any]) -> None:
        kind = type(owner)
        if id(owner) in self._paths or kind.__module__.partition(".")[0] == "lightning_influence":
            return
        try:
            others = {name: make(self, kind) for name, make in _OTHERS.items() if hasattr(kind, name)}
            set_class(owner, watched_class(kind, functools.partial(self._attribute, kind), others))
        except TypeError:  # an object of a class that is not Python's
            return
        self._classes.append((owner, kind))
        self._paths[id(owner)] = path, again

    def _attribute(self, kind: type, owner: Any, name: str) -> Any:
        path, again = self._paths.get(id(owner), ("", None))
        place = f"{path}.{name}" if path else name
        try:
            value = own_value(owner, name, kind)
        except AttributeError:
            self._first.setdefault(place, {"is": "absent", "value": None})
            self._read.setdefault(place, None)
            raise
        if again is None or (not path and (name.startswith("_") or name in _NOT_RECORDED)):
            return value
        if not path and is_of_the_process(kind, name) and _is_object(value):
            return value
        return self.seen(place, value, lambda: getattr(again(), name))

    def seen(self, path: str, value: Any, again: Callable[[], Any] | None) -> Any:
        """Note a value that was read.

        Args:
            path: its path from the Trainer.
            value: it.
            again: reads it again; None for the result of a call that is not repeated.
        """
        if value is self._trainer or isinstance(value, (nn.Module, type)):
            return value
        if callable(value) and not hasattr(type(value), "__len__") and hasattr(value, "__name__"):
            return self._called(path, value, again)
        if path not in self._first:
            found = as_json(value, strict=False)
            self._first[path] = {"is": "once", "value": found} if again is None else found
            self._read[path] = again
        if again is not None:
            self._watch_inside(path, value, again)
        return value

    def _watch_inside(self, path: str, value: Any, again: Callable[[], Any]) -> None:
        if isinstance(value, (list, tuple, dict)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if _is_object(item) and len(value) <= 16 and not isinstance(item, nn.Module):
                    self._watch_inside(f"{path}[{key!r}]", item, functools.partial(lambda key: again()[key], key))
        elif _is_object(value):
            self._watch(value, path, again)

    def _called(self, path: str, function: Callable[..., Any], again: Callable[[], Any] | None) -> Callable[..., Any]:
        """The function, whose results are noted where its arguments are plain and it returns something plain."""
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        is_getter = type(owner).__module__.partition(".")[0] in LIBRARIES and name.startswith(_READ_AGAIN)

        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            try:
                as_json([args, kwargs])
                as_json(value)
            except NotPlain:
                return value
            if value is not None:
                shown = ", ".join([*map(repr, args), *(f"{key}={item!r}" for key, item in kwargs.items())])
                repeat = (lambda: again()(*args, **kwargs)) if again is not None and is_getter else None
                self.seen(f"{path}({shown})", value, repeat)
            return value

        return noted

    def _patch(self, name: str, source: str, member: Callable[[int], Any], path: str) -> None:
        """Watch what ``self.optimizers()`` or ``self.lr_schedulers()`` returns."""
        own = getattr(self._module, name)
        if name in self._module.__dict__:
            return

        def noted(*args: Any, **kwargs: Any) -> Any:
            value = own(*args, **kwargs)
            single = not isinstance(value, (list, tuple))
            count = None if value is None else -1 if single else len(value)
            self._first.setdefault(f"{name}()", count)
            self._read.setdefault(f"{name}()", None)
            for i, item in enumerate([] if value is None else [value] if single else value):
                self._first.setdefault(path.format(i), as_json(item, strict=False))
                self._read.setdefault(path.format(i), None)
                self._watch(item, path.format(i), functools.partial(member, i))
            return value

        self._module.__dict__[name] = noted
        self._patched.append(name)


def _is_object(value: Any) -> bool:
    try:
        as_json(value)
    except NotPlain:
        return True
    return False


def _length(values: TrainerReads, kind: type) -> Callable[[Any], int]:
    def noted(self: Any) -> int:
        value = kind.__len__(self)  # type: ignore[attr-defined]
        path, again = values._paths.get(id(self), ("", None))
        if again is not None:
            values.seen(f"len({path})", value, lambda: len(again()))
        return int(value)

    return noted


_OTHERS: dict[str, Callable[[TrainerReads, type], Callable[..., Any]]] = {"__len__": _length}
