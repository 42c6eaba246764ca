"""The optimizer's parameter groups, numbered over all optimizers, and what its steps apply to each: rates and decay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lightning_influence.trajectory.checkpoint import is_decoupled, is_plain_sgd
from lightning_influence.trajectory.columns import to_numpy


@dataclass(frozen=True)
class ParameterGroups:
    """Groups of parameters that every step treated alike, numbered over all optimizers.

    Args:
        places: for each entry of the optimizer options, [group]: the optimizer's own group that each group belonged to,
            or -1 where it belonged to none: another optimizer's, not yet added, or frozen.
        of_parameter: the group number of every parameter that any step trained.
    """

    places: tuple[np.ndarray, ...]
    of_parameter: dict[str, int]

    @property
    def count(self) -> int:
        """The number of groups."""
        return len(self.places[0]) if self.places else 0

    @classmethod
    def of(cls, settings: Sequence[dict[str, Any]]) -> "ParameterGroups":
        """The groups of a fit; parameters frozen, added or moved during the fit get groups of their own."""
        layouts = [_layout(entry) for entry in settings]
        distinct = sorted(dict.fromkeys(layouts), key=itemgetter(0))  # few, however often an option changed
        places: dict[str | tuple[int, int], list[int]] = {}
        for k, (optimizer, groups, frozen) in enumerate(distinct):
            for index, names in enumerate(groups):
                members: list[str | tuple[int, int]] = [name for name in names if name not in frozen]
                if not names:  # a file may not name a group's parameters: the group is then its own only member
                    members.append((optimizer, index))
                for name in members:
                    places.setdefault(name, [-1] * len(distinct))[k] = index
        numbers: dict[tuple[int, ...], int] = {}
        of_name = {name: numbers.setdefault(tuple(where), len(numbers)) for name, where in places.items()}
        table = np.array(list(numbers), dtype=np.int64).reshape(len(numbers), len(distinct))
        row_of = {layout: table[:, k] for k, layout in enumerate(distinct)}
        named = {name: number for name, number in of_name.items() if isinstance(name, str) and name}
        return cls(tuple(row_of[layout] for layout in layouts), named)

    def spread(self, entry: int, values: Sequence[float]) -> np.ndarray:
        """[group]: the values of the optimizer's own groups under one entry of its options; 0 for groups it lacks."""
        place = self.places[entry]
        return np.where(place < 0, 0.0, np.append(values, 0.0)[place])


_Layout = tuple[int, tuple[tuple[str, ...], ...], frozenset[str]]


def _layout(entry: dict[str, Any]) -> _Layout:
    groups = tuple(tuple(group["parameters"]) for group in entry["groups"])
    return entry["optimizer"], groups, frozenset(entry.get("frozen", ()))


def gain(group: dict[str, Any]) -> float:
    """How far a gradient moves the weights over all later steps, per unit of learning rate.

    (1 - dampening) / (1 - momentum) for SGD, 1 for other optimizers; negative where the loss is maximised.
    """
    sign = -1.0 if group.get("maximize") else 1.0
    momentum = group.get("momentum") or 0.0
    if not is_plain_sgd(group) or momentum == 0.0:
        return sign
    return sign * (1.0 - group["dampening"]) / (1.0 - momentum)


def effective_rates(rows: pa.Table, settings: Sequence[dict[str, Any]], groups: ParameterGroups) -> np.ndarray:
    """[step, group]: learning rate × gain of momentum × clip coefficient / divisor of gradient accumulation."""
    effective = np.zeros((len(rows), groups.count))
    gains = [[gain(group) for group in entry["groups"]] for entry in settings]
    columns = (rows[name].to_pylist() for name in ("lr", "settings", "clip", "divisor"))
    for row, (rates, entry, clip, divisor) in enumerate(zip(*columns, strict=True)):
        scale = (1.0 if clip is None else clip) / divisor
        effective[row] = groups.spread(entry, np.multiply(rates, gains[entry]) * scale)
    return effective


def last_rates(rows: pa.Table, step: int, settings: Sequence[dict[str, Any]], groups: ParameterGroups) -> list[float]:
    """[group]: the learning rates of each optimizer's last of these steps up to one, or else of its first."""
    steps, entries = (to_numpy(rows[name]) for name in ("step", "settings"))
    optimizers = np.array([entry["optimizer"] for entry in settings], dtype=np.int64)[entries]
    total = np.zeros(groups.count)
    for optimizer in dict.fromkeys(optimizers.tolist()):
        own = np.flatnonzero(optimizers == optimizer)
        before = own[steps[own] <= step]
        row = int(before[-1] if len(before) else own[0])
        total += groups.spread(int(entries[row]), rows["lr"][row].as_py())
    return [float(rate) for rate in total]


def shrinkage(rows: pa.Table, settings: Sequence[dict[str, Any]], groups: ParameterGroups) -> Tensor:
    """[group] float64: the sum over the steps of learning rate × decoupled weight decay."""
    total = np.zeros(groups.count)
    for entry, rates in zip(rows["settings"].to_pylist(), rows["lr"].to_pylist(), strict=True):
        options = settings[entry]
        decays = [float(g.get("weight_decay") or 0.0) * is_decoupled(options, g) for g in options["groups"]]
        total += groups.spread(entry, np.multiply(rates, decays))
    return torch.from_numpy(total)


class AlwaysFirst(Mapping[str, int]):
    """Group 0 for every parameter: a ``.ckpt`` with one learning rate need not name its parameters."""

    def __getitem__(self, name: str) -> int:
        return 0

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __contains__(self, name: object) -> bool:
        return True
