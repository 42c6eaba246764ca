"""Numbers that a module keeps as plain attributes, and that hooks may change during a fit: the weight of a loss."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_influence.module.trainer_reads import LIBRARIES
from lightning_influence.types import clean

Number = bool | int | float
History = Mapping[str, Sequence[tuple[int, Number]]]
"""(optimizer steps so far, value) by path: at the first checkpoint after the initial one, then each change."""


class NumberRecord:
    """Notes the numbers of a module at each checkpoint; ``changed`` has those that the fit changed.

    Args:
        module: of the fit, at its start.
        resumed: whether it continues an earlier run, whose values hold no longer.
    """

    def __init__(self, module: nn.Module, resumed: bool) -> None:
        self._module = module
        self._initial = {} if resumed else numbers_of(module)
        self._seen: dict[str, list[tuple[int, Number]]] = {}
        self._step = -1

    def note(self, step: int) -> None:
        """Note the present values, unless the step has been noted: hooks that come later prepare the next epoch."""
        if step == self._step:
            return
        self._step = step
        for path, value in numbers_of(self._module).items():
            entries = self._seen.setdefault(path, [])
            if not entries or not _same(entries[-1][1], value):
                entries.append((step, value))

    @property
    def changed(self) -> dict[str, list[tuple[int, Number]]]:
        """The values of what has changed since the start of the fit."""
        return {
            path: entries
            for path, entries in self._seen.items()
            if len(entries) > 1 or path not in self._initial or not _same(entries[0][1], self._initial[path])
        }


def numbers_of(module: nn.Module) -> dict[str, Number]:
    """The numbers among the attributes of a module and its submodules, by path; those of libraries' classes aside."""
    found = {}
    for name, part in module.named_modules():
        if type(part).__module__.partition(".")[0] in LIBRARIES:
            continue
        for key, value in vars(part).items():
            if type(value) in (bool, int, float) and not key.startswith("_") and key != "training":
                found[f"{clean(name)}.{key}" if name else key] = value
    return found


def put_back(module: nn.Module, history: History, step: int) -> None:
    """Give a module's numbers the values that they had at a checkpoint, or at the first one after it."""
    if not history:
        return
    parts: dict[str, Any] = {clean(name): part for name, part in module.named_modules()}
    for path, entries in history.items():
        name, _, key = path.rpartition(".")
        attributes = vars(parts[name]) if name in parts else {}
        if type(attributes.get(key)) in (bool, int, float):
            attributes[key] = next((value for at, value in reversed(entries) if at <= step), entries[0][1])


def _same(one: Number, other: Number) -> bool:
    return type(one) is type(other) and (one == other or (one != one and other != other))  # noqa: PLR0124 - NaN
