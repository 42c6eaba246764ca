"""Gradients shortened for comparison: large parameters by a seeded random projection, small ones whole."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_influence.devices import Readings, read_numbers
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.precise import Tolerance
from lightning_influence.gradients.spot_checks import agreements, peaks
from lightning_influence.numerics.projections import PlainSketch, Projector, RandomProjection, Sketch

# Parameters of at most this many entries are compared entry by entry, others by so many random combinations.
_SMALL = 2**12
_COMBINATIONS = 16


@dataclass(frozen=True)
class Digest:
    """One gradient, shortened.

    Args:
        values: by parameter: its entries, or random combinations of them, which are of the size of its norm.
        spread: by parameter: how much larger rounding errors of its entries may be together, in such a combination.
        peaks: reads by parameter that has entries the largest magnitude of one; NaN or infinity if there is one.
        peak: the largest of them, where the gradient is.
    """

    values: Mapping[str, Tensor]
    spread: Mapping[str, float]
    peaks: Callable[[], Mapping[str, float]]
    peak: Tensor

    @cached_property
    def largest(self) -> float:
        """The largest magnitude of an entry; NaN or infinity if there is one."""
        return functools.reduce(_larger, self.peaks().values(), 0.0)

    @cached_property
    def nonzero(self) -> frozenset[str]:
        """The parameters with an entry other than 0."""
        return frozenset(name for name, peak in self.peaks().items() if peak)

    @property
    def is_finite(self) -> bool:
        """Whether all entries are finite."""
        return math.isfinite(self.largest)

    def flat(self, names: Iterable[str] | None = None) -> Tensor:
        """The values one behind the other, in float64 on the CPU.

        Args:
            names: of the parameters; None: all.
        """
        values = [self.values[name].detach().cpu() for name in (self.values if names is None else names)]
        values = [torch.view_as_real(value) if value.is_complex() else value for value in values]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(value.double().flatten() for value in values)])


@dataclass
class Digester:
    """Makes digests, with the same combinations for all gradients that are compared.

    Args:
        readings: of the digests' largest entries.
    """

    readings: Readings
    _project: Projector = field(default_factory=lambda: Projector(RandomProjection(_COMBINATIONS, entries="gaussian")))

    def of(self, gradient: Mapping[str, Tensor]) -> Digest:
        """The digest of one gradient, [*shape] by parameter."""
        values = {name: self._sketch(name, g.shape, g).rows(g[None])[0] for name, g in gradient.items()}
        spread = {n: 1.0 if v.numel() == gradient[n].numel() else gradient[n].numel() ** 0.5 for n, v in values.items()}
        names = [name for name, g in gradient.items() if g.numel()]
        largest = peaks(gradient[name] for name in names)
        read = self.readings.later(largest)
        return Digest(values, spread, lambda: dict(zip(names, read(), strict=False)), largest.max())

    def rows(self, parts: Mapping[Names, Part], wanted: set[str]) -> dict[str, Tensor]:
        """[example, ...]: the values of the digests of a block's gradients, for parts with parameters in ``wanted``."""
        found: dict[str, Tensor] = {}
        for names, part in parts.items():
            if wanted.isdisjoint(names):
                continue
            sketches = [self._sketch(n, shape, part.like) for n, shape in zip(names, part.shapes(), strict=True)]
            if all(isinstance(s, PlainSketch) and s.matrix is None for s in sketches):
                found |= dict(zip(names, part.dense(), strict=True))
            else:
                shortened = part.projected(sketches)
                found |= {name: one.dense()[0] for name, one in zip(names, shortened, strict=True)}
        return found

    def _sketch(self, name: str, shape: Sequence[int], like: Tensor) -> Sketch:
        if math.prod(shape) <= _SMALL or like.is_complex():
            return PlainSketch(None)
        return self._project(name, tuple(shape), like)


Compared = tuple[Mapping[str, Tensor], int, Digest]
"""[example, ...] values of a block's digests by parameter, see ``Digester.rows``; a row; its digest by autograd."""


def agreeing(checks: Sequence[Compared], names: set[str], tolerance: Tolerance = None) -> set[str]:
    """The parameters whose gradients are right up to rounding errors in all comparisons, which are read together.

    If a digest is not finite there is nothing to compare; the attributor reports every such example.

    Args:
        checks: what is compared; a parameter that is absent from the values is zero.
        names: the parameters.
        tolerance: relative to the parameter's and to the largest entry; None: that of the dtype.
    """
    with_entries = [name for name in names if all(truth.values[name].numel() for *_, truth in checks)]
    if not with_entries:
        return names
    right = read_numbers([_agree(*each, with_entries, tolerance) for each in checks])
    return names - {name for each in right for name, holds in zip(with_entries, each, strict=True) if not holds}


def _agree(rows: Mapping[str, Tensor], row: int, truth: Digest, names: Sequence[str], tolerance: Tolerance) -> Tensor:
    """[parameter]: whether the gradients of one example are those of its digest, if that is finite."""
    true = [truth.values[name] for name in names]
    mine = [None if name not in rows else rows[name][row].view_as(t) for name, t in zip(names, true, strict=True)]
    sizes, spread = peaks(true), [truth.spread[name] for name in names]
    largest = truth.peak * (spread[0] if len(set(spread)) == 1 else sizes.new_tensor(spread))
    return agreements(mine, true, sizes, largest, tolerance) | ~truth.peak.isfinite()


def _larger(one: float, other: float) -> float:
    """The larger number, or NaN."""
    return one if math.isnan(one) or one >= other else other
