"""The self-check: compares every trainable parameter's gradients with plain autograd before anything is scored."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_influence.data.examples import Block
from lightning_influence.gradients.digests import Digest, agreeing
from lightning_influence.gradients.engine import Engine
from lightning_influence.gradients.general import NotVectorisable, vectorised_rows
from lightning_influence.gradients.layout import BY_INDEX, Layout, fits
from lightning_influence.gradients.mixing import MixingWatch
from lightning_influence.gradients.plan import Plan
from lightning_influence.gradients.precise import CANNOT, precise
from lightning_influence.gradients.rules.computed import Source
from lightning_influence.gradients.sample import Sample
from lightning_influence.gradients.spot_checks import tolerance_of
from lightning_influence.gradients.tape import Call
from lightning_influence.types import foreign


def make_plan(engine: Engine, sample: Sample, names: Sequence[str]) -> Plan:
    """Find for every parameter the cheapest path whose gradients agree with one backward pass per example.

    Args:
        engine: the engine, at the weights where the check is made.
        sample: of the dataset, with gradients of these parameters.
        names: the trainable parameters.

    Raises:
        ValueError: the gradient of a batch of training examples is not the sum of its examples' gradients.
    """
    plan = _made(engine, sample, names)
    if not (plan.vectorised or plan.one_by_one):
        return plan
    if engine.examples is not None:  # no later pass of a block may show what its examples weigh
        for block in sample.blocks:
            _check_sum(engine, sample, block, names)
    if all(p.dtype is torch.float64 for p in engine.task.named_parameters(names).values()):
        return plan
    with contextlib.suppress(*CANNOT), precise(engine.task, torch.float64) as task:
        again = Sample(task, sample.examples, names)
        return _merged(plan, _made(replace(engine, task=task), again, names))
    return plan


def confirmed(engine: Engine, sample: Sample, plan: Plan) -> bool:
    """Whether a plan that was made for other examples of the same loss is right for these.

    Args:
        engine: the engine, at the weights where the plan was made.
        sample: of the dataset, with gradients of the plan's parameters.
        plan: with layer rules only, since others depend on how a batch is made.
    """
    if plan.vectorised or plan.one_by_one:
        return False
    recorded, blocks = _calls(engine, sample), sample.blocks
    reached = _reached(recorded)
    if sample.copy_leaves != plan.copy_leaves or any(tape.uses - plan.uses for tape in sample.tapes):
        return False
    if any(plan.layouts.get(name) not in _candidates(name, recorded, blocks) for name in reached):
        return False
    rows = [_factored(engine, sample, b, calls, plan.layouts, plan.separate) for b, calls in enumerate(recorded)]
    return _agreeing(sample, rows, set(plan.names)) == set(plan.names) and _separate(recorded) <= plan.separate


def measured(engine: Engine, sample: Sample, plan: Plan) -> Plan:
    """The plan with the bytes of one example's gradient, as it computes it."""
    calls, block = _calls(engine, sample)[-1], sample.blocks[-1]
    parts, lost = engine.parts_of(calls, block, plan.layouts, plan.separate)
    parameters = engine.task.named_parameters([*plan.vectorised, *plan.one_by_one, *lost])
    dense = sum(p.numel() * p.element_size() for p in parameters.values())
    return replace(plan, bytes_of_one=dense + sum(part.query_bytes(1) for part in parts.values()))


def _check_sum(engine: Engine, sample: Sample, block: Block, names: Sequence[str]) -> None:
    """Compare the gradient of a block with the sum of its examples'; ``Guard.check_sum`` repeats it and refuses."""
    ids = list(dict.fromkeys(block.ids))
    joint = sample.gradient(ids)
    weights = engine.weights_of(ids)
    factor = engine.reduction.factor(len(ids), weights)
    shares = [1.0] * len(ids) if weights is None else weights.tolist()
    known = [
        (one, share) for i, share in zip(ids, shares, strict=True) if share and (one := _truth(sample, i)).is_finite
    ]
    if not joint.is_finite:
        return  # the attributor reports every such example
    largest = max([joint.largest * factor, *(one.largest * share for one, share in known)])
    for name in names:
        whole, parts = joint.values[name] * factor, [one.values[name] * share for one, share in known]
        size = max([float(x.abs().max()) for x in (whole, *parts)]) if whole.numel() else 0.0
        relative, floor = engine.task.tolerance or tolerance_of(whole)
        allowed = relative * size + floor * largest * joint.spread[name]
        if whole.numel() and float((whole - sum(parts)).abs().max()) > allowed:
            engine.guard.check_sum(engine, block, ids, names)
            return
    engine.guard.made += 1


def _truth(sample: Sample, example: int) -> Digest:
    found = sample.alone(example, gradient=True).gradient
    assert found is not None
    return found


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


def _made(engine: Engine, sample: Sample, names: Sequence[str]) -> Plan:
    recorded, blocks = _calls(engine, sample), sample.blocks
    truths = [_truth(sample, example) for ids in sample.compared for example in ids.values()]
    separate = _separate(recorded)
    candidates = {name: _candidates(name, recorded, blocks) for name in names}
    layouts: dict[str, Layout] = {}
    for i in range(max((len(c) for c in candidates.values()), default=0)):
        tried = {n: c[i] for n, c in candidates.items() if i < len(c) and n not in layouts}
        rows = [_factored(engine, sample, b, calls, tried, separate) for b, calls in enumerate(recorded)]
        layouts |= {name: tried[name] for name in _agreeing(sample, rows, set(tried))}
    nonzero = set().union(*(truth.nonzero for truth in truths))
    reached = _reached(recorded)
    unreached = tuple(name for name in names if name not in reached and name not in nonzero)
    general = [name for name in names if name not in layouts and name not in unreached]
    fast = _vectorised(engine, sample, general)
    mixing = sample.mixing or MixingWatch(1)
    return Plan(
        {n: layouts[n] for n in names if n in layouts},
        tuple(name for name in general if name in fast),
        tuple(name for name in general if name not in fast),
        separate,
        sample.copy_leaves,
        frozenset().union(*(tape.uses for tape in sample.tapes)),
        unreached,
        tuple(name for name in names if nonzero and name not in nonzero and name not in unreached),
        branches=frozenset(tape.branch.value for tape in sample.tapes),
        mixing=mixing.why,
        mixed_before=mixing.in_hooks,
        reads=mixing.reads,
        closely=mixing.reads or mixing.why is not None or sample.examples.has_own_collate,
    )


_Rows = tuple[dict[str, Tensor], set[str]]
"""Digests of the gradients of a block, and the parameters for which they failed."""


def _calls(engine: Engine, sample: Sample) -> list[list[Call]]:
    """What was recorded of each block, back from the sum of its examples' losses."""
    recorded = []
    for tape, block in zip(sample.tapes, sample.blocks, strict=True):
        by = engine.reduction.factor(block.size, engine.weights_of(block.ids))
        found = [(call, call.gradient) for call in tape.calls if call.gradient is not None]
        recorded.append([call if by == 1 else replace(call, gradient=g * by) for call, g in found])
    return recorded


def _factored(
    engine: Engine,
    sample: Sample,
    number: int,
    calls: Sequence[Call],
    layouts: Mapping[str, Layout],
    separate: frozenset[str],
) -> _Rows:
    """The gradients of a block from recorded calls, under one choice of layouts."""
    parts, failed = engine.parts_of(calls, sample.blocks[number], layouts, separate)
    return sample.digester.rows(parts, set(layouts)), set(failed)


def _vectorised(engine: Engine, sample: Sample, names: Sequence[str]) -> set[str]:
    """The parameters whose gradients ``torch.func`` computes rightly."""
    if not names:
        return set()
    try:
        found = [vectorised_rows(engine.task, block, names) for block in sample.blocks]
    except NotVectorisable:
        return set()
    return _agreeing(sample, [(sample.digester.rows(parts, set(names)), set()) for parts in found], set(names))


def _agreeing(sample: Sample, rows: Sequence[_Rows], names: set[str]) -> set[str]:
    """The parameters whose gradients agree with plain autograd for all examples."""
    names = names.difference(*(failed for _, failed in rows))
    checks = [
        (of_block, row, _truth(sample, example))
        for (of_block, _), of in zip(rows, sample.compared, strict=True)
        for row, example in of.items()
    ]
    return agreeing(checks, names, sample.task.tolerance)


def _candidates(name: str, recorded: Sequence[Sequence[Call]], blocks: Sequence[Block]) -> list[Layout]:
    """The layouts that fit every call with a parameter in both batches."""
    uses = [
        (call.shape[: call.operands.positions], block.size, call.taken)
        for calls, block in zip(recorded, blocks, strict=True)
        for call in calls
        if name in call.names
    ]
    fitting = [layout for layout in Layout if uses and all(fits(shape, n, layout, taken) for shape, n, taken in uses)]
    if _may_concatenate(blocks):
        return [layout for layout in fitting if layout in (Layout.FIRST, Layout.SECOND)]
    return [layout for layout in fitting if layout not in BY_INDEX or any(taken for *_, taken in uses)]


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


def _reached(recorded: Sequence[Sequence[Call]]) -> set[str]:
    """The parameters on which the loss depends through recorded calls."""
    return {name for calls in recorded for call in calls for name in call.names}


def _separate(recorded: Sequence[Sequence[Call]]) -> frozenset[str]:
    """Parameters that are used with different partners, such as a weight tied between layers with their own biases.

    So are those of calls that read a weight as stored in different ways: a bias cannot share a part with both.
    """
    partners: dict[str, set[tuple[frozenset[str], bool]]] = {}
    for calls in recorded:
        for call in calls:
            direct = frozenset(s.names[0] for s in call.sources.values() if type(s) is Source)
            computed = [frozenset(s.names) for s in call.sources.values() if type(s) is not Source]
            turned = bool(call.operands.options.get("transposed"))
            for together, name in (((t, turned), n) for t in (direct, *computed) for n in t):
                partners.setdefault(name, set()).add(together)
    return frozenset(name for name, uses in partners.items() if len(uses) > 1)
