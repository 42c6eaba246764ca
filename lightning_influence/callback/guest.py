"""What `Influence` holds during a fit, what a resumed fit finds of it, and how it lets go.

A fit that cannot be recorded goes on without it.
"""

import contextlib
import copy
import functools
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning_influence.callback.during_fit import DuringFit
from lightning_influence.callback.results import Results, run_of
from lightning_influence.capture.identity import LoaderTap
from lightning_influence.capture.places import CannotRecord
from lightning_influence.capture.recorder import Recorder
from lightning_influence.compat import CallbackBase, MisconfigurationException, rank_zero_warn
from lightning_influence.hints import Hinted
from lightning_influence.methods.method import Method
from lightning_influence.methods.plain_loss import LABELS
from lightning_influence.scores import Scores, SelfScores
from lightning_influence.trajectory import Trajectory

# attributes that hold the model or open files
_NOT_PICKLED = ("log", "log_dict", "_trainer", "_module", "_recorder", "_tap", "_during", "_last")
_PACKAGE = Path(__file__).parents[1]
Hook = TypeVar("Hook", bound=Callable[..., Any])


def guarded(hook: Hook) -> Hook:
    """Decorate a hook of `Influence`, so that an error inside ends the recording instead of the fit.

    Wrong arguments (`MisconfigurationException` of this package, raised before the first step) pass, and so does what
    is no `Exception`, such as Ctrl-C. While the callback records one Trainer, hooks that another calls do nothing.
    """

    @functools.wraps(hook)
    def run(self: "Guest", trainer: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.records_another(trainer):
            if hook.__name__ == "_set_up":
                rank_zero_warn(
                    "`Influence` records the fit of another Trainer, so this fit is not recorded. Give each Trainer an"
                    " `Influence` of its own."
                )
            return None
        try:
            return hook(self, trainer, *arguments, **keywords)
        except MisconfigurationException:
            raise
        except Exception as error:
            self.give_up(trainer, error)
            return None

    return run  # type: ignore[return-value]


def reason_of(error: Exception) -> str:
    """The cause, with its place in the code unless the message was written for users."""
    if isinstance(error, CannotRecord):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _PACKAGE in Path(frame.filename).parents and "guest.py" not in frame.filename]
    where = (own or frames)[-1:]
    place = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in where)
    return f"{type(error).__name__}{place}: {error}"


def warn_of(error: Exception, recorded: Path | None) -> None:
    """Warn that the fit goes on without being recorded.

    Args:
        error: what went wrong.
        recorded: folder of what was recorded before, if anything was.
    """
    rest = f" What was recorded before is in {str(recorded)!r}." if recorded is not None else ""
    text = f"`Influence` does not record this fit, which goes on without it. {reason_of(error)}{rest}"
    if isinstance(error, CannotRecord):
        rank_zero_warn(text)
    else:  # perhaps in one process only
        warnings.warn(text, UserWarning, stacklevel=3)


class Guest(CallbackBase, Hinted):
    """A callback that holds what belongs to one fit, and can let go of it at any time."""

    methods: dict[str, Method]
    dirpath: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self._self_scores = Results()
        self._scores = Results(self._self_scores)
        self._run_dir: Path | None = None
        self._token = os.urandom(16).hex()  # by which the process that starts those of a fit finds what they left
        self._phase = "new"  # then "set up", and "training" from the first step on
        self._trainer: Any = None
        self._module: Any = None
        self._tap: LoaderTap | None = None
        self._recorder: Recorder | None = None
        self._during: DuringFit | None = None
        self._link: dict[str, Any] = {}  # where a later fit finds the run, once this one has ended
        self._restored: dict[str, Any] = {}  # the link to the run that this fit resumes
        self._broken: str | None = None  # the record lacks the end of the fit, since
        self._last: Trajectory | None = None  # the last weights in memory, where the record of the fit broke off

    @property
    def scores(self) -> Results:
        """`Scores` by name of the method, or why there are none."""
        self._read_left()
        return self._scores

    @property
    def self_scores(self) -> Results:
        """`SelfScores` by name of the method, or why there are none."""
        self._read_left()
        return self._self_scores

    @property
    def run_dir(self) -> Path | None:
        """Folder of the newest fit."""
        self._read_left()
        return self._run_dir

    @run_dir.setter
    def run_dir(self, folder: Path | None) -> None:
        self._run_dir = folder

    def _read_left(self) -> None:
        """Where no fit was set up in this process: what the processes of one left, if it started any."""
        found = run_of(self.dirpath, self._token) if self._phase == "new" else None
        if found is not None and found != self._run_dir:
            self._run_dir = found
            self._scores.read(found, Scores, self.methods)
            self._self_scores.read(found, SelfScores, (*self.methods, LABELS))

    def records_another(self, trainer: Any) -> bool:
        """Whether another Trainer's fit is being recorded, to which this one's hooks must add nothing."""
        other = self._trainer
        return self._recorder is not None and other is not trainer and other.state.status == "running"

    def give_up(self, trainer: Any, error: Exception) -> None:
        """Warn, and record nothing more of this fit; scores say why there are none."""
        if self._phase != "training":  # what an earlier fit left is not about this one
            self._forget()
        why, recorded = reason_of(error), self.run_dir
        for results in (self.scores, self.self_scores):
            results.why = why
            results.reasons |= dict.fromkeys(self.methods, why)
        with contextlib.suppress(Exception):
            if self._recorder is not None:
                self._recorder.broken(why)
        with contextlib.suppress(OSError):
            if self.run_dir is not None and trainer.is_global_zero:
                self.run_dir.rmdir()  # an empty folder, as nothing was recorded
                self.run_dir = recorded = None
        with contextlib.suppress(Exception):
            self._unwire()
        self._during = self._recorder = self._tap = None
        warn_of(error, recorded)

    def state_dict(self) -> dict[str, Any]:
        """Where a resumed fit finds this run: builtins only, so that checkpoints load with `weights_only=True`."""
        if self._recorder is None or self.run_dir is None:
            return dict(self._link)  # of a fit that has ended: `trainer.save_checkpoint` may come after it
        try:
            self._recorder.flush()  # a fit that resumes from this checkpoint needs every step before it
            if self._during is not None:
                self._during.save(self._recorder.made)
        except Exception as error:
            self.give_up(self._trainer, error)
            return {}
        if self._recorder.failed:
            return {}
        link = {"run": self.run_dir.name, "path": str(self.run_dir), "step": self._recorder.made}
        return link | {"id": self._recorder.manifest["id"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the link to the run that is resumed."""
        self._restored = dict(state_dict)

    @guarded
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Accept the state of an `Influence` with other arguments, such as one more method."""
        states = checkpoint.get("callbacks", {})
        own = [state for key, state in states.items() if str(key).startswith(type(self).__qualname__ + "{")]
        if self.state_key not in states and len(own) == 1:
            self._restored = dict(own[0])

    def _check_present(self) -> None:
        """Raise CannotRecord in a callback that the Trainer did not have when the fit was set up."""
        if self._phase == "new":
            raise CannotRecord(
                "Expected this `Influence` in the Trainer from the start of the fit, got one that was added or copied"
                " later, perhaps by another library. Pass it to `Trainer(callbacks=[...])`."
            )

    def _forget(self) -> None:
        """Remove what an earlier fit left in this callback."""
        self.scores.clear()
        self.self_scores.clear()
        self.run_dir = self._trainer = self._module = self._last = None
        self._link = {}

    def _stop(self) -> None:
        for part in (self._during, self._recorder):
            if part is not None:
                part.close()
        self._during = self._recorder = None

    def _unwire(self) -> None:
        self._stop()
        if self._tap is not None:
            self._tap.release()
            self._tap = None

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return state | {name: None for name in _NOT_PICKLED if name in state} | {"_phase": "new"}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guest":
        """A copy for another fit; one that a library makes before the first step may take the place of the original."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        if self._phase == "set up":
            copied._phase, copied._tap = self._phase, self._tap
        else:
            copied._token = os.urandom(16).hex()
        return copied
