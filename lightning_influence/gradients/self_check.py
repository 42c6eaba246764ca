"""The self-check: compares every trainable parameter's gradients with plain autograd before anything is scored."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_influence.data.examples import Block, Examples
from lightning_influence.gradients.block import Names
from lightning_influence.gradients.engine import Engine, Plan
from lightning_influence.gradients.general import NotVectorisable, one_gradient, vectorised_rows
from lightning_influence.gradients.layout import Layout, fits
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.precise import CANNOT, precise
from lightning_influence.gradients.spot_checks import agrees, largest_entry
from lightning_influence.gradients.tape import Call
from lightning_influence.types import foreign

# Two batches of unequal size: the dimension whose size equals the batch size in both holds the examples.
_SIZES = (3, 5)


def make_plan(engine: Engine, examples: Examples, names: Sequence[str]) -> Plan:
    """Find for every parameter the cheapest path whose gradients agree with one backward pass per example.

    Args:
        engine: the engine, at the weights where the check is made.
        examples: the dataset, of which 8 examples are used.
        names: the trainable parameters.

    Raises:
        ValueError: the gradient of a batch of training examples is not the sum of its examples' gradients.
    """
    plan = _made(engine, examples, names)
    if not (plan.vectorised or plan.one_by_one):
        return plan
    if engine.examples is not None:  # no later pass of a block may show what its examples weigh
        for block in _sample(examples):
            engine.guard.check_sum(engine, block, list(dict.fromkeys(block.ids)), names)
    if all(p.dtype is torch.float64 for p in engine.task.named_parameters(names).values()):
        return plan
    with contextlib.suppress(*CANNOT), precise(engine.task, torch.float64) as task:
        return _merged(plan, _made(replace(engine, task=task), examples, names))
    return plan


def _merged(plan: Plan, precisely: Plan) -> Plan:
    """The plan, with the faster paths that rounding errors kept some parameters from."""
    layouts = {n: precisely.layouts[n] for n in (*plan.vectorised, *plan.one_by_one) if n in precisely.layouts}
    fast = [n for n in plan.one_by_one if n in precisely.vectorised]
    return replace(
        plan,
        layouts={**plan.layouts, **layouts},
        vectorised=tuple(n for n in (*plan.vectorised, *fast) if n not in layouts),
        one_by_one=tuple(n for n in plan.one_by_one if n not in layouts and n not in fast),
    )


def _made(engine: Engine, examples: Examples, names: Sequence[str]) -> Plan:
    blocks = _sample(examples)
    try:
        tapes = [engine.record(block, names, False) for block in blocks]
        copy_leaves = False
    except RuntimeError as error:
        if "in-place" not in str(error):
            raise
        blocks = _sample(examples)
        tapes = [engine.record(block, names, True) for block in blocks]
        copy_leaves = True
    recorded = [[call for call in tape.calls if call.gradient is not None] for tape in tapes]
    separate = _separate(recorded)
    candidates = {name: _candidates(name, recorded, blocks) for name in names}
    attempts = [
        _Attempt(engine, recorded, blocks, {n: c[i] for n, c in candidates.items() if i < len(c)}, separate)
        for i in range(max((len(c) for c in candidates.values()), default=0))
    ]
    vectorised = _vectorised(engine, blocks, names, attempts)
    nonzero = _compare(engine, blocks, names, attempts, vectorised)
    layouts: dict[str, Layout] = {}
    for attempt in attempts:
        layouts.update({n: attempt.layouts[n] for n in names if n in attempt.agreeing and n not in layouts})
    reached = {name for calls in recorded for call in calls for name in call.names.values()}
    unreached = tuple(name for name in names if name not in reached and name not in nonzero)
    general = [name for name in names if name not in layouts and name not in unreached]
    missing = [name for name in general if vectorised is None or name not in vectorised.agreeing]
    fast = tuple(name for name in general if name not in missing)
    uses = frozenset().union(*(tape.uses for tape in tapes))
    zero = tuple(name for name in names if nonzero and name not in nonzero and name not in unreached)
    return Plan(
        {n: layouts[n] for n in names if n in layouts},
        fast,
        tuple(missing),
        separate,
        copy_leaves,
        uses,
        unreached,
        zero,
    )


class _Attempt:
    """Factored gradients of the sampled examples under one choice of layouts."""

    def __init__(
        self,
        engine: Engine,
        recorded: Sequence[Sequence[Call]],
        blocks: Sequence[Block],
        layouts: dict[str, Layout],
        separate: frozenset[str],
    ) -> None:
        self.layouts = layouts
        self.parts: list[dict[Names, Part]] = []
        self.agreeing = set(layouts)
        for calls, block in zip(recorded, blocks, strict=True):
            parts, failed = engine.parts_of(calls, block, layouts, separate)
            self.parts.append(parts)
            self.agreeing -= set(failed)

    def row(self, block: int, example: int) -> dict[str, Tensor]:
        """One example's gradient for the parameters that have agreed so far."""
        rows: dict[str, Tensor] = {}
        for names, part in self.parts[block].items():
            if self.agreeing & set(names):
                dense = part.slice(slice(example, example + 1)).dense()
                rows.update({name: row[0] for name, row in zip(names, dense, strict=True)})
        return rows


class _Vectorised(_Attempt):
    """Gradients of the sampled examples by ``torch.func``."""

    def __init__(self, engine: Engine, blocks: Sequence[Block], names: Sequence[str]) -> None:
        self.layouts = {}
        self.agreeing = set(names)
        self.parts = [vectorised_rows(engine.task, block, names) for block in blocks]


def _vectorised(
    engine: Engine, blocks: Sequence[Block], names: Sequence[str], attempts: Sequence[_Attempt]
) -> _Vectorised | None:
    """The gradients by ``torch.func`` of the parameters whose factored gradients are wrong for the first example.

    None if there are no such parameters, or if the module cannot be vectorised.
    """
    first = blocks[0]
    truth = one_gradient(engine.task, first.one(first.start), names, engine.seed, first.start)
    largest = largest_entry(truth.values())
    suspect = [
        n for n in names if not any(agrees(a.row(0, 0).get(n), truth[n], largest) for a in attempts if n in a.agreeing)
    ]
    try:
        return _Vectorised(engine, blocks, suspect) if suspect else None
    except NotVectorisable:
        return None


def _compare(
    engine: Engine,
    blocks: Sequence[Block],
    names: Sequence[str],
    attempts: Sequence[_Attempt],
    vectorised: _Vectorised | None,
) -> set[str]:
    """Remove from every attempt the parameters that disagree with plain autograd on any example.

    Returns:
        The parameters whose gradients are not all zero.
    """
    nonzero: set[str] = set()
    all_attempts = [*attempts] if vectorised is None else [*attempts, vectorised]
    for b, block in enumerate(blocks):
        for i, example in enumerate(block.ids):
            truth = one_gradient(engine.task, block.one(example), names, engine.seed, example)
            nonzero |= {name for name, gradient in truth.items() if bool(gradient.any())}
            if not all(bool(gradient.isfinite().all()) for gradient in truth.values()):
                continue  # nothing to compare; the attributor reports every such example
            largest = largest_entry(truth.values())
            for attempt in all_attempts:
                rows = attempt.row(b, i)
                attempt.agreeing = {n for n in attempt.agreeing if agrees(rows.get(n), truth[n], largest)}
    return nonzero


def _sample(examples: Examples) -> list[Block]:
    """Two blocks of examples spread over the dataset, with repetition if it is tiny."""
    n = len(examples)
    # Not `evenly_spread`: always this many, and other examples in the second block than in the first.
    ids = [[(round((i + 0.5 * b) * n / size)) % n for i in range(size)] for b, size in enumerate(_SIZES)]
    return [examples.chosen(chosen) for chosen in ids]


def _candidates(name: str, recorded: Sequence[Sequence[Call]], blocks: Sequence[Block]) -> list[Layout]:
    """The layouts that fit every call with a parameter in both batches."""
    uses = [
        (call.shape[: call.operands.positions], block.size)
        for calls, block in zip(recorded, blocks, strict=True)
        for call in calls
        if name in call.names.values()
    ]
    allowed = [Layout.FIRST, Layout.SECOND] if _may_concatenate(blocks) else list(Layout)
    return [layout for layout in allowed if uses and all(fits(shape, n, layout) for shape, n in uses)]


def _may_concatenate(blocks: Sequence[Block]) -> bool:
    """Whether the batches may concatenate examples of different lengths along one dimension, as graph batches do.

    Equal lengths in the self-check's batches do not exclude it.
    """
    dimensions = []
    for block in blocks:
        leaves = [
            x for leaf in tree_leaves(block.batch) for x in (leaf.values() if isinstance(leaf, Mapping) else [leaf])
        ]
        if any(foreign(leaf) for leaf in leaves):
            return True
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0]
        dimensions.append([{d for d, size in enumerate(t.shape[:2]) if size == block.size} for t in tensors])
    return any(not set.intersection(*same) for same in zip(*dimensions, strict=False))


def _separate(recorded: Sequence[Sequence[Call]]) -> frozenset[str]:
    """Parameters that are used with different partners, such as a weight tied between layers with their own biases."""
    partners: dict[str, set[frozenset[str]]] = {}
    for calls in recorded:
        for call in calls:
            together = frozenset(call.names.values())
            for name in together:
                partners.setdefault(name, set()).add(together)
    return frozenset(name for name, sets in partners.items() if len(sets) > 1)
