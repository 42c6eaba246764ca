"""Whether a batch's loss and gradient are the sums of its examples', and which example is at fault where not."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.devices import wide
from lightning_influence.gradients.general import one_gradient, requiring_gradients
from lightning_influence.gradients.precise import Tolerance
from lightning_influence.gradients.reduction import PASS_LOSS
from lightning_influence.gradients.spot_checks import (
    UnequalWeight,
    is_finite,
    largest_entry,
    smallest_scale,
    tolerance_of,
)
from lightning_influence.module.random_state import seed_for
from lightning_influence.numerics.subsets import evenly_spread

if TYPE_CHECKING:
    from lightning_influence.gradients.engine import Engine

# Examples of a block among which the odd one is looked for before a refusal names it.
_SUSPECTS = 48
_WAY_OUT_OF_LOSS = "Let `loss=` return what each example would have alone: per-sample losses"


def add_up(engine: "Engine", ids: Sequence[int], names: Sequence[str], tolerance: Tolerance = None) -> bool:
    """Whether the gradient of a batch of training examples is the sum of the gradients of its examples alone.

    Args:
        engine: with ``examples``.
        ids: of the examples.
        names: of the parameters.
        tolerance: relative to the parameter's and to the largest entry; None: that of the weights' dtype.
    """
    singles = [_single(engine, i, names) for i in ids]
    total, joint = _joint(engine, ids, names)
    if not is_finite(joint):
        return True  # the attributor reports every such example
    known = [single for single in singles if is_finite(single)]
    largest = largest_entry([g for single in [joint, *known] for g in single.values()])
    if tolerance is not None:
        largest = torch.maximum(
            largest, smallest_scale(total, engine.task.named_parameters(names).values()).to(largest)
        )
    for name, found in joint.items():
        size = torch.stack([s[name].abs().max() for s in [joint, *known]]).max() if found.numel() else 0.0
        relative, floor = tolerance or engine.task.tolerance or tolerance_of(found)
        expected = sum(s[name] for s in known)
        if found.numel() and bool((found - expected).abs().max() > relative * size + floor * largest):
            return False
    return True


def losses_add_up(
    engine: "Engine", block: Block, total: Tensor | None, alone: Tensor | None, tolerance: Tolerance = None
) -> bool:
    """Whether the loss of a block is the sum of the losses of its examples alone.

    Args:
        engine: computes the losses.
        block: the examples.
        total: their sum by one pass of the block; None: not known yet.
        alone: [example]; None: not known yet.
        tolerance: relative to the sum of the magnitudes; None: that of the weights' dtype.
    """
    with requiring_gradients(engine.task.module, ()):
        if alone is None:
            alone = torch.stack([_loss(engine, block, i) for i in block.ids])
        if total is None:
            total = engine.total(block).detach()
    if not bool(total.isfinite()):
        return True
    relative = (tolerance or engine.task.tolerance or tolerance_of(total))[0]
    if (weights := engine.weights_of(block.ids)) is not None:
        alone = torch.where((weights == 0).to(alone.device), 0, alone * weights.to(alone))
    known, total = wide(alone[alone.isfinite()]), wide(total)
    return bool((total - known.sum()).abs() <= relative * (known.abs().sum() + total.abs()))


def refusal(engine: "Engine", block: Block, row: int, names: Sequence[str]) -> UnequalWeight:
    """The error for a block in which an example weighs otherwise than alone; see ``_described``."""
    suspects = {row, *engine.guard.unlike.extremes(block)}
    error = UnequalWeight(str(_described(engine, block, row, names)), block.ids)
    error.suspects = [block.ids[r] for r in sorted(suspects)]
    error.of_queries = engine.examples is None
    return error


def _described(engine: "Engine", block: Block, row: int, names: Sequence[str]) -> ValueError:
    """The error for a block in which an example weighs otherwise than alone; it names the most unlike example.

    Args:
        engine: whose gradients they are.
        block: the examples.
        row: one that is known to differ.
        names: of the parameters.
    """
    odd, factor = row, 1.0
    if engine.examples is not None:
        odd, factor = _odd_one(engine, block, row, names)
    finite = math.isfinite(float(_loss(engine, block, block.ids[odd])))
    if engine.plan.mixing is not None and factor == 1 and finite:
        odd = row
    example, unusual = block.ids[odd], engine.guard.unlike.describe(block, odd)
    has = f" ({unusual})" if unusual else ""
    way_out = PASS_LOSS if engine.task.loss is None else _WAY_OUT_OF_LOSS
    expected = f"Expected example {example} to weigh in its batch as it does alone, got"
    if not finite:
        return ValueError(
            f"{expected} a finite loss in its batch, and NaN or infinity alone{has}. A mean over the labels of a whole "
            f"batch weighs the others by how many there are. {way_out}."
        )
    if abs(math.log(factor)) > 1e-4:
        return ValueError(
            f"{expected} a weight of {factor:.3g} times that of other examples{has}. A mean over the labels, tokens or "
            "pixels of a whole batch weighs examples by how many they have, a weighted mean by their weights"
            f"{_other_causes(engine)}. {way_out}."
        )
    if engine.plan.mixing is not None:
        return ValueError(
            f"{expected} another loss or gradient{has}. The loss follows from {engine.plan.mixing}, by which examples "
            f"change one another's loss. {way_out}."
        )
    if engine.examples is not None and block.size > 1 and add_up(engine, list(block.ids), names):
        return ValueError(
            f"{expected} the gradient of another example{has}: the model reorders the examples of a batch. {way_out}, "
            "or `batch_size=1`."
        )
    return ValueError(
        f"{expected} a different gradient{has}. The loss may average over the tokens of the whole batch, or examples "
        f"may change one another's loss. {way_out}."
    )


def _other_causes(engine: "Engine") -> str:
    if engine.plan.mixing is not None:
        return f"; this loss also follows from {engine.plan.mixing}"
    if engine.plan.reads:
        return ", a branch on a number read from the batch (`if x.max() > 3`) by the others in it"
    return ""


def _odd_one(engine: "Engine", block: Block, row: int, names: Sequence[str]) -> tuple[int, float]:
    """The row whose weight is furthest from that of most others, and its weight relative to theirs."""
    rows = sorted({row, *engine.guard.unlike.extremes(block), *evenly_spread(block.size, _SUSPECTS)})
    for r in rows:
        if not math.isfinite(float(_loss(engine, block, block.ids[r]))):
            return r, 1.0
    ids = {r: block.ids[r] for r in rows}
    if len(rows) == 1 and (other := engine.guard.unlike.other(ids[row])) is not None:
        ids[-1] = other  # a block of one
    singles = {r: single for r, i in ids.items() if is_finite(single := _single(engine, i, names))}
    reference = max(singles, key=lambda r: float(largest_entry(singles[r].values())), default=row)
    logs = {reference: 0.0}
    for r, single in singles.items():
        if r != reference:
            share = _share(_joint(engine, [ids[r], ids[reference]], names)[1], single, singles[reference])
            logs |= {} if share is None else {r: math.log(share)}
    usual = statistics.median_low(logs.values()) if len(logs) > 2 or -1 not in logs else logs[-1]
    odd = max((r for r in logs if r >= 0), key=lambda r: abs(logs[r] - usual), default=row)
    return odd, math.exp(logs.get(odd, usual) - usual)


def _share(joint: Mapping[str, Tensor], one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float | None:
    """How much more one example weighs than another in the gradient of both, by least squares; None if unknown."""
    flat = [torch.cat([wide(g).flatten() for g in x.values()]) for x in (one, other, joint)]
    columns = torch.stack(flat[:2], 1)
    lengths = columns.norm(dim=0)
    if not bool((lengths > 0).all()) or not bool(flat[2].isfinite().all()):
        return None
    columns = columns / lengths
    gram = columns.T @ columns
    if float(torch.linalg.det(gram)) < 1e-6:
        return None
    weights = torch.linalg.solve(gram, columns.T @ flat[2]) / lengths
    a, b = weights.tolist()
    return a / b if a > 0 and b > 0 else None


def _single(engine: "Engine", example: int, names: Sequence[str]) -> dict[str, Tensor]:
    """The gradient of one example's loss, times its weight."""
    assert engine.examples is not None
    found = one_gradient(engine.task, engine.examples.one(example), names, example)
    if (weights := engine.weights_of([example])) is None:
        return found
    weight = float(weights)
    return {name: g * weight if weight else torch.zeros_like(g) for name, g in found.items()}


def _joint(engine: "Engine", ids: Sequence[int], names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the losses of a batch of training examples, and its gradient."""
    assert engine.examples is not None
    parameters = engine.task.named_parameters(names)
    with requiring_gradients(engine.task.module, names):
        total = engine.total(engine.examples.chosen(ids))
        if not total.requires_grad:
            return total, {name: torch.zeros_like(p) for name, p in parameters.items()}
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return total.detach(), {
        name: torch.zeros_like(p) if g is None else g.to_dense()
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def _loss(engine: "Engine", block: Block, example: int) -> Tensor:
    batch = engine.task.to_device(block.one(example))
    seed_for(example)
    return engine.task(batch).detach().sum()
