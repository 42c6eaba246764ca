"""Puts cross-entropies that keep their digits into the place of torch's, while scores are computed."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from lightning_influence.module.torch_functions import Args, Function, FunctionWatch, Kwargs
from lightning_influence.numerics.log_probabilities import EXACT


class _ExactLosses(FunctionWatch):
    """While active, calls the functions of ``log_probabilities`` for those of torch that they stand for."""

    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run ``func``, or what keeps more digits."""
        return EXACT.get(func, func)(*args, **kwargs)


@contextlib.contextmanager
def exact_losses() -> Iterator[None]:
    """Replace torch's cross-entropies inside, beneath all modes that watch torch's functions: they see those called."""
    if any(isinstance(mode, _ExactLosses) for mode in _get_current_function_mode_stack()):
        yield
        return
    mode = _ExactLosses()
    put_back([mode, *taken_off()])
    try:
        yield
    finally:
        put_back([other for other in taken_off() if other is not mode])


def taken_off() -> list[TorchFunctionMode]:
    """The modes that were active, the last one entered at the end; none is now."""
    return [_pop_mode() for _ in _get_current_function_mode_stack()][::-1]


def put_back(modes: Sequence[TorchFunctionMode]) -> None:
    """Make these the active modes; none is."""
    for mode in modes:
        _push_mode(mode)
