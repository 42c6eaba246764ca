"""Asks a question once more where its first answer showed that examples weigh unequally in their batches."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from lightning_influence.gradients.spot_checks import UnequalWeight
from lightning_influence.processes import Processes
from lightning_influence.setting.session import Session

P = ParamSpec("P")
R = TypeVar("R")


class HasSession(Protocol):
    """An object that asks questions of one module and its training data."""

    processes: Processes
    _session: Session


S = TypeVar("S", bound=HasSession)


def asking_again(ask: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that is called once more if a spot check finds that the loss is a mean over tokens.

    Its examples then weigh by their tokens; those that the loss was probed with had equally many.
    """

    @functools.wraps(ask)
    def asked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with self.processes.together():
                return ask(self, *args, **kwargs)
        except UnequalWeight as error:
            with self.processes.together():
                if not any(self._session.probe_again(ids) for ids in (error.suspects, error.block) if ids):
                    raise
        with self.processes.together():
            return ask(self, *args, **kwargs)

    return asked
