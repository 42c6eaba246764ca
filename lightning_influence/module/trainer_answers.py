"""What a user's code reads of the Trainer while it is scored: the values of the fit, or a refusal."""

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch

from lightning_influence.module.trainer_reads import (
    FitValues,
    class_named,
    from_json,
    is_of_the_process,
    is_users,
    own_value,
    set_class,
    watched_class,
)

_AT_CHECKPOINTS = "Use a method that needs checkpoints only, such as `TracInCP()`"
_MISSING = object()
# Arguments of the Trainer, which no fit changes.
_ARGUMENTS = {"max_epochs", "max_steps", "min_epochs", "min_steps", "log_every_n_steps", "default_root_dir"}


# Paths of the index of the present batch.
_INDEX = ("fit_loop.batch_idx", "fit_loop.epoch_loop.batch_idx")


class TrainerAnswers:
    """Answers reads of a Trainer: recorded values of the fit first.

    What was not recorded is answered by a Trainer that has fitted; by another one, if it is about the present process,
    device, stage or loggers; by one that a user passed, also if it was set by its arguments.

    Args:
        trainer: the module's Trainer.
        fit: what the fit recorded.
        device: of recorded tensors.
    """

    def __init__(self, trainer: Any, fit: FitValues, device: torch.device) -> None:
        self._record, self._exact, self._given, self._device = fit.record, fit.exact, fit.given, device
        self._trainer, self._kind = trainer, type(trainer)
        with contextlib.suppress(Exception):
            self._fitted = trainer.global_step > 0 or trainer.train_dataloader is not None
        self._fitted = getattr(self, "_fitted", False)
        self._paths = {path for _, values in fit.record for path in values}
        self.step = -1
        self.notes: set[str] = set()

    @property
    def needed(self) -> bool:
        """Whether the Trainer would not answer by itself."""
        return bool(self._record) or not self._fitted

    def attribute(self, owner: Any, name: str) -> Any:
        """The value of the Trainer's attribute."""
        if name.startswith("_") or name in ("global_step", "current_epoch") or self._is_method(name):
            return own_value(owner, name, self._kind)
        own = functools.partial(own_value, owner, name, self._kind)
        if name == "is_last_batch":
            raise self._refusal(name, "which differs from batch to batch", "Leave it out of the step")
        is_here = self._fitted or (name == "datamodule" and own() is not None)
        found = self.recorded(name, own if is_here else None)
        if found is not _MISSING:
            return found
        if is_of_the_process(self._kind, name):
            return own()
        if is_here:
            return self.present(name, own())
        if self._given:
            with contextlib.suppress(Exception):
                value = own()
                if not _is_empty(value):
                    return value
        raise self._refusal(name)

    def present(self, path: str, value: Any) -> Any:
        """A present value, in place of one that the fit's first batch did not read; noted where a record is known."""
        is_function = callable(value) and hasattr(value, "__name__")
        if self._record and not is_function and path not in _ARGUMENTS:
            self.notes.add(
                f"`trainer.{path}` was not recorded, as the fit's first batch did not read it or it is an object: its "
                "present value is used, which may differ from those in the fit."
            )
        return value

    def _is_method(self, name: str) -> bool:
        return callable(getattr(self._kind, name, None)) and not isinstance(getattr(self._kind, name), property)

    def recorded(self, path: str, own: Any = None) -> Any:
        """The recorded value of a path at the present step, or ``_MISSING``.

        Args:
            path: from the Trainer.
            own: reads the present value, which answers what was not recorded of an object; None where there is none.

        Raises:
            ValueError: it changed during the fit, and is not known at this step.
        """
        if path in _INDEX:  # `Task.at` sets it, as the clock is set
            return self._trainer.__dict__["fit_loop"].epoch_loop.batch_progress.current.ready - 1
        if path not in self._paths:
            return _MISSING
        found = [(step, values[path]) for step, values in self._record if path in values]
        steady = all(value == found[0][1] for _, value in found)
        if not steady and self.step >= 0 and self.step not in self._exact:
            raise self._refusal(path, "which changed during the fit and is known at checkpoints only", _AT_CHECKPOINTS)
        past = [value for step, value in found if step <= self.step or self.step < 0]
        if not past:  # a fit that resumed a run without a record
            return _MISSING
        value = past[-1]
        if isinstance(value, dict) and value["is"] == "absent":
            raise AttributeError(path)
        if isinstance(value, dict) and value["is"] == "unknown":
            raise self._refusal(path, f"which could not be read at the checkpoint of step {self.step}")
        if isinstance(value, dict) and value["is"] == "once":
            value = value["value"]
            self.notes.add(f"`trainer.{path}` is given as the fit's first batch had it.")
        return from_json(value, self._device, path, functools.partial(_Recorded, self, own=own))

    def refuse(self, path: str) -> None:
        """Raise for a path that was not recorded."""
        raise self._refusal(path)

    def _refusal(self, path: str, why: str = "", way_out: str = "") -> ValueError:
        if not why and self._record:
            why = "which `training_step` did not read in the fit's first batch"
        why = why or "which no run has recorded: it is up to the Trainer's arguments or to the fit"
        kind = "the Trainer that has fitted" if self._given else "the Trainer that fitted or one with its arguments"
        return ValueError(
            f"Expected `trainer.{path}` as it was in the fit, got a read of it by `training_step` or a hook, {why}. "
            f"{way_out or f'Pass `trainer=`, {kind}'}, or pass `loss=`, a callable (module, batch) -> [batch] of "
            "per-sample losses that does not need it."
        )

    # ---- the module's own methods ---------------------------------------------------------------------------------

    def of_module(self, name: str) -> Any:
        """What ``self.optimizers()`` or ``self.lr_schedulers()`` returned in the fit."""
        count = self.recorded(f"{name}()")
        if count is _MISSING:
            raise self._refusal("optimizers" if name == "optimizers" else "lr_scheduler_configs")
        if count is None:
            return None
        path = "optimizers[{}]" if name == "optimizers" else "lr_scheduler_configs[{}].scheduler"
        items = [self.recorded(path.format(i)) for i in range(max(count, 1))]
        return items[0] if count == -1 else items


class _Recorded:
    """Takes the place of an object of the fit: answers what was read from it."""

    def __init__(self, answers: TrainerAnswers, path: str, kind: str, own: Any = None) -> None:
        self.__dict__["_of"] = (answers, path, kind, own)

    def _kind(self) -> Any:
        """The class of the object that it takes the place of, for ``isinstance``."""
        answers, path, kind, _ = self.__dict__["_of"]
        found = class_named(kind)
        if found is None and is_users(sys._getframe(1)):
            answers.refuse(path)
        return found or _Recorded

    locals()["__class__"] = property(_kind)

    def __getattr__(self, name: str) -> Any:
        answers, path, _, own = self.__dict__["_of"]
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        below = None if own is None else (lambda: getattr(own(), name))
        found = answers.recorded(f"{path}.{name}", below)
        if found is not _MISSING:
            return found
        if any(p.startswith(f"{path}.{name}(") for p in answers._paths):
            return functools.partial(_call, answers, f"{path}.{name}")
        if below is not None:
            return answers.present(f"{path}.{name}", below())
        return answers.refuse(f"{path}.{name}")

    def __len__(self) -> int:
        answers, path, _, own = self.__dict__["_of"]
        found = answers.recorded(f"len({path})")
        if found is _MISSING:
            found = answers.refuse(f"{path}` (its length)") if own is None else len(own())
        return int(found)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        answers, path, _, own = self.__dict__["_of"]
        return iter(own()) if own is not None else iter(answers.refuse(f"{path}` (its items)"))  # type: ignore[call-overload,no-any-return]

    def __getitem__(self, key: Any) -> Any:
        answers, path, _, own = self.__dict__["_of"]
        found = answers.recorded(f"{path}[{key!r}]")
        if found is not _MISSING:
            return found
        item = f"{path}[{key!r}]"
        return answers.refuse(item) if own is None else answers.present(item, own()[key])

    def __setattr__(self, name: str, value: Any) -> None:
        answers, path, _, _ = self.__dict__["_of"]
        answers.refuse(f"{path}.{name}")


def _call(answers: TrainerAnswers, path: str, *args: Any, **kwargs: Any) -> Any:
    shown = ", ".join([*map(repr, args), *(f"{key}={item!r}" for key, item in kwargs.items())])
    found = answers.recorded(f"{path}({shown})")
    return answers.refuse(f"{path}({shown})") if found is _MISSING else found


def _is_empty(value: Any) -> bool:
    """Whether this is what a Trainer answers before it has fitted."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is None or (isinstance(value, (list, tuple, dict)) and len(value) == 0)


@contextlib.contextmanager
def answering(module: Any, fit: FitValues, device: torch.device) -> Iterator[None]:
    """Answer reads of ``module.trainer`` by a user's code from the fit's record, see ``TrainerAnswers``."""
    trainer = getattr(module, "_trainer", None)
    answers = None if trainer is None else TrainerAnswers(trainer, fit, device)
    if answers is None or not answers.needed:
        yield
        return
    kind = type(trainer)
    set_class(trainer, watched_class(kind, answers.attribute, {"_answers": answers}))
    names = [] if answers._fitted and not answers._paths else ["optimizers", "lr_schedulers"]
    before = {name: module.__dict__[name] for name in names if name in module.__dict__}
    for name in names:
        if not answers._fitted or f"{name}()" in answers._paths:
            module.__dict__[name] = functools.partial(_of_module, answers, name)
    try:
        yield
    finally:
        set_class(trainer, kind)
        for name in names:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


def _of_module(answers: TrainerAnswers, name: str, *args: Any, **kwargs: Any) -> Any:
    return answers.of_module(name)


def answers_of(trainer: Any) -> TrainerAnswers | None:
    """What answers for a Trainer at present."""
    found: TrainerAnswers | None = vars(type(trainer)).get("_answers")
    return found


def notes_of(trainer: Any) -> list[str]:
    """What a reader of the scores should know about the answers that were given so far."""
    answers = answers_of(trainer)
    return [] if answers is None else sorted(answers.notes)
