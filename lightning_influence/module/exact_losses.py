"""Puts cross-entropies that keep their digits into the place of torch's, while a loss is computed for its scores."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from lightning_influence.numerics.log_probabilities import EXACT


class _ExactLosses(TorchFunctionMode):
    """While active, calls the functions of ``log_probabilities`` for those of torch that they stand for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return EXACT.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def exact_losses() -> Iterator[None]:
    """Replace torch's cross-entropies inside, beneath all modes that watch torch's functions: they see those called."""
    above = list(_get_current_function_mode_stack())
    if any(isinstance(mode, _ExactLosses) for mode in above):
        yield
        return
    with _beneath(above):
        _push_mode(_ExactLosses())
    try:
        yield
    finally:
        with _beneath(above):
            _pop_mode()


@contextlib.contextmanager
def _beneath(above: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """Take these modes, which are the last ones entered, off the stack inside."""
    for _ in above:
        _pop_mode()
    try:
        yield
    finally:
        for mode in above:
            _push_mode(mode)
