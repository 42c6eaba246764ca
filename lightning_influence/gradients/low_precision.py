"""Gradients of a few examples in 16 bits beside those in float32: whether they are right, how near, how fast."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_influence.devices import wide
from lightning_influence.gradients.digests import Compared, agreeing
from lightning_influence.gradients.engine import Computed, Engine
from lightning_influence.gradients.general import one_gradient
from lightning_influence.gradients.plan import Plan
from lightning_influence.gradients.sample import Sample
from lightning_influence.module.precision import Precision
from lightning_influence.module.snapshot import holding
from lightning_influence.timing import seconds_of
from lightning_influence.wording import counted

# Of the usual gradient: beyond it, float16 is refused.
_LOST = 0.2


@dataclass(frozen=True)
class LowPrecision:
    """How gradients in 16 bits compare with those in full precision.

    Args:
        examples: how many were compared.
        difference: the largest length of a difference, relative to the gradient in full precision.
        usual: their median.
        vanished: the share of the entries other than 0 that are 0 in 16 bits.
        ratio: the time of a pass of the examples, relative to one in full precision.
    """

    examples: int
    difference: float
    usual: float
    vanished: float
    ratio: float

    def refuse_lost(self, word: str | None) -> None:
        """Raises ValueError where float16 has too little range for most gradients, as it has without a scaled loss."""
        if self.vanished and self.usual > _LOST:
            raise ValueError(
                f"Expected gradients that float16 holds, got some that differ from those in float32 by "
                f"{self.usual:.0%} with `precision={word!r}`: {self.vanished:.0%} of their entries become 0. Use "
                "'bf16-mixed', or None."
            )

    def __str__(self) -> str:
        """A sentence about the gradients."""
        lost = f", and {self.vanished:.0%} of their entries become 0" if self.vanished >= 0.005 else ""
        some = counted(self.examples, "example")
        return f"Gradients of {some} differ from those in float32 by up to {self.difference:.1%}{lost}"


def checked_in(engine: Engine, sample: Sample) -> Plan:
    """The engine's plan in its task's precision of 16 bits, from comparing a block with passes of single examples.

    Parameters whose gradients in the block differ from those of the examples alone are computed one example at a time.

    Args:
        engine: with a plan that was checked in full precision.
        sample: of the dataset.
    """
    plan, block = engine.plan, sample.blocks[0]
    names = [*plan.layouts, *plan.vectorised]
    computed = engine.in_block(block)
    rows = sample.digester.rows(computed.parts, set(names))
    good = set(names) - set(computed.slow)
    checks: list[Compared] = []
    for row, example in enumerate(block.ids):
        alone = one_gradient(engine.task, block.one(example), names, example)
        truth = sample.digester.of(alone)
        if truth.is_finite:
            checks.append((rows, row, truth))
    good = agreeing(checks, good, engine.task.tolerance)
    slow = [name for name in names if name not in good and name not in plan.one_by_one]
    return replace(
        plan,
        layouts={name: layout for name, layout in plan.layouts.items() if name in good},
        vectorised=tuple(name for name in plan.vectorised if name in good),
        one_by_one=(*plan.one_by_one, *slow),
    )


def compared(engine: Engine, sample: Sample, precision: Precision) -> LowPrecision | None:
    """Compare gradients in a precision of 16 bits with those in full precision; None where the module fails in it.

    Args:
        engine: in full precision, with its plan.
        sample: of the dataset.
        precision: of 16 bits.
    """
    task = engine.task
    narrow = precision.low is torch.float16  # bfloat16 has the range of float32
    full = _rows(engine, sample, narrow)
    with holding([task], "precision", precision):
        try:
            _rows(engine, sample)  # the first pass also prepares kernels
            low = _rows(engine, sample, narrow)
        except Exception:  # it is not asked for, or the check of the plan has raised it
            return None
    names = [name for name in full.each if name in low.each]  # the others take one pass per example
    if not names:
        return None
    of_full, of_low = (torch.cat([rows.each[name] for name in names], 1) for rows in (full, low))
    lengths, apart = of_full.norm(dim=1), (of_low - of_full).norm(dim=1)
    known = lengths.isfinite() & (lengths > 0)
    if not bool(known.any()):
        return None
    apart = torch.where(apart.isfinite(), apart, torch.inf)
    vanished = 0.0
    if narrow:
        held = sum(int((g != 0).sum()) for g in full.one.values())
        lost = sum(int(((g != 0) & (low.one[name] == 0)).sum()) for name, g in full.one.items() if name in low.one)
        vanished = lost / max(1, held)
    differences = (apart / lengths)[known]
    times = low.seconds / max(full.seconds, 1e-9)
    return LowPrecision(sample.blocks[-1].size, float(differences.max()), float(differences.median()), vanished, times)


class _Rows(NamedTuple):
    """Gradients of a block.

    Args:
        each: [example, entries] by parameter: their digests, in float64 on the CPU.
        one: the whole gradient of the first example, by parameter, where it is wanted.
        seconds: that a pass took.
    """

    each: Mapping[str, Tensor]
    one: Mapping[str, Tensor]
    seconds: float


def _rows(engine: Engine, sample: Sample, whole: bool = False) -> _Rows:
    """The gradients of a sample's last block of all parameters but those that take one pass per example."""
    found: list[Computed] = []
    seconds = seconds_of(lambda: found.append(engine.in_block(sample.blocks[-1])))
    names = {name for names in found[0].parts for name in names}
    rows = sample.digester.rows(found[0].parts, names)
    each = {name: wide(row.detach()).flatten(1).cpu() for name, row in rows.items() if not row.is_complex()}
    return _Rows(each, found[0].row(0) if whole else {}, seconds)
