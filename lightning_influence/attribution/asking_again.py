"""Asks a question once more where its first answer showed that too few examples were checked before."""

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
    """A method that is called once more if a spot check fails that more checks before scoring may explain.

    Its layers may be used in ways that few examples did not show, or the loss may be a mean over tokens, of which those
    that it was probed with had equally many.
    """

    @functools.wraps(ask)
    def asked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        while True:
            try:
                with self.processes.together():
                    return ask(self, *args, **kwargs)
            except UnequalWeight as error:
                with self.processes.together():
                    # one of them may have found a verdict of earlier checks that another wrote meanwhile
                    if not any(self.processes.gathered(self._session.knows_more_after(error))):
                        raise

    return asked
