"""The gradient engine: per-sample gradients of a block of examples at the module's current weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.data.examples import Block, Examples
from lightning_influence.devices import onto
from lightning_influence.gradients.block import Gradients, Names
from lightning_influence.gradients.carried_back import apart, carried_back
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.general import (
    NotVectorisable,
    requiring_gradients,
    rows_one_by_one,
    vectorised_rows,
)
from lightning_influence.gradients.guard import Again, Guard
from lightning_influence.gradients.layout import Layout, LayoutMismatch, Split
from lightning_influence.gradients.mixing import MixingWatch
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.plan import Plan
from lightning_influence.gradients.reduction import Reduction
from lightning_influence.gradients.rules.computed import Source
from lightning_influence.gradients.spot_checks import SuspectRows
from lightning_influence.gradients.sum_of_parts import sum_of
from lightning_influence.gradients.tape import Call, Tape, constants_of
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.task import Task


@dataclass
class Computed:
    """What was computed for a block.

    Args:
        parts: the gradients.
        slow: the parameters that take one pass per example.
        total: the sum of the block's losses, by a pass of it as a batch; None if there was none.
        alone: [example]: losses by passes of single examples; None if there were none.
    """

    parts: dict[Names, Part]
    slow: list[str]
    total: Tensor | None
    alone: Tensor | None = None

    def row(self, row: int) -> dict[str, Tensor]:
        """One example's gradient by parameter."""
        rows = slice(row, row + 1)
        return {n: g[0] for names, p in self.parts.items() for n, g in zip(names, p.slice(rows).dense(), strict=True)}


@dataclass
class Engine:
    """Computes per-sample gradients of a module's training loss, as a plan says.

    Args:
        task: the module, silenced and in eval mode, with its loss.
        reduction: how a batch's loss relates to the losses of its examples.
        groups: the optimizer's parameter group of each parameter; 0 where it is missing.
        plan: how each parameter's gradients are computed; made by ``make_plan``.
        examples: the training dataset, whose batches must have the sum of their examples' gradients, also where no
            block is run as a batch; None: the examples are not trained on, as queries are not.
        guard: checks the gradients.
        weights: [example] of the dataset, where a batch's loss is a mean over tokens: the tokens of each example,
            relative to their mean. None: all examples of a batch have the same weight.
        outputs_checked_at: the task, and the version of its weights, whose loss was found to depend on the parameters
            through the network's outputs only.
    """

    task: Task
    reduction: Reduction
    groups: Mapping[str, int] = field(default_factory=dict)
    plan: Plan = field(default_factory=lambda: Plan({}))
    examples: Examples | None = None
    guard: Guard = field(default_factory=Guard)
    weights: Tensor | None = None
    outputs_checked_at: tuple[Task, int] | None = None
    _width: int = 0
    _positions: set[tuple[str, float]] = field(default_factory=set)

    @property
    def vector_bytes(self) -> int:
        """The bytes of a vector with one entry per entry of the plan's parameters, in their dtypes."""
        parameters = self.task.named_parameters()
        return sum(parameters[name].numel() * parameters[name].element_size() for name in self.plan.names)

    def gradients(
        self,
        block: Block,
        set_random_state: Callable[[], Any] | None = None,
        checked: bool = True,
        again: Again | None = None,
    ) -> Gradients:
        """Per-sample gradients of the plan's parameters, each in the cheapest form that its operations allow.

        Args:
            block: the examples.
            set_random_state: called before the batch's forward pass. The examples then have gradients that depend on
                the batch's random numbers, which a pass of a single example cannot reproduce: there are no spot checks.
            checked: whether there are spot checks; not for gradients that are only measured.
            again: reads the block once more. With it, what a device finds out in spot checks is not waited for, until
                ``read_checks`` is called.

        Raises:
            ValueError: a spot check found an example whose gradient in its batch differs from its gradient alone; or,
                with ``set_random_state``, a parameter's gradients take passes of single examples.
        """
        plan, watch, new = self.plan, None, False
        rows: dict[int, int | None] = {}
        if checked and set_random_state is None:
            watch = SuspectRows(block.size)
            self.guard.unlike.closely = plan.closely
            rows, new = self.guard.choose(block)  # before the transfer, so that a device is not made to wait
        computed = self.in_block(block, watch, set_random_state)
        slow = computed.slow
        if set_random_state is not None and (plan.vectorised or slow):
            raise ValueError(
                f"Expected parameters with factored per-sample gradients, got `"
                f"{', '.join((*plan.vectorised, *slow)[:5])}`, for which each example takes a pass of its own. That "
                "cannot reproduce the random numbers (dropout) and sizes of the example's batch. Pass `loss=`, a "
                "callable (module, batch) -> [batch] of per-sample losses."
            )
        if slow:
            found, computed.alone = rows_one_by_one(self.task, block, slow)
            computed.parts.update(found)
        if watch is not None:
            self.guard.check(self, block, computed, rows, new, watch, again)
        groups = {names: self.groups.get(names[0], 0) for names in computed.parts}
        weights = self.weights_of(block.ids)
        parts = computed.parts if weights is None else _without_empty(computed.parts, weights != 0)
        return Gradients(parts, groups, block.size)

    def read_checks(self) -> None:
        """Wait for what spot checks found out since the last time; see ``gradients``.

        Raises:
            ValueError: an example's gradient in its batch differs from its gradient alone.
        """
        self.guard.read(self)

    def in_block(
        self, block: Block, watch: SuspectRows | None = None, set_random_state: Callable[[], Any] | None = None
    ) -> "Computed":
        """The gradients that are computed for all examples of a block at once; see ``gradients``.

        Args:
            block: the examples.
            watch: collects rows to check.
            set_random_state: called before the batch's forward pass; nothing is vectorised then.
        """
        plan = self.plan
        parts: dict[Names, Part] = {}
        slow, total = list(plan.one_by_one), None
        if plan.layouts or plan.unreached:
            tape = self.record(block, plan.names, plan.copy_leaves, watch, set_random_state)
            total = tape.total
            unplanned = {name for name, _ in tape.uses - plan.uses}
            layouts = {n: layout for n, layout in plan.layouts.items() if n not in unplanned}
            parts, mismatched = self.parts_of(tape.calls, block, layouts, plan.separate)
            reached = unplanned.union(*(call.names for call in tape.calls if call.gradient is not None))
            slow += [
                *mismatched,
                *(n for n in plan.layouts if n in unplanned),
                *(n for n in plan.unreached if n in reached),
            ]
            if watch is not None:
                watch.branch = tape.branch.value
                self._note_positions(tape.calls, watch)
        if plan.vectorised and set_random_state is None:
            try:
                parts.update(vectorised_rows(self.task, block, plan.vectorised))
            except NotVectorisable:
                slow += plan.vectorised
        return Computed(parts, slow, total)

    def _note_positions(self, calls: Sequence[Call], watch: SuspectRows) -> None:
        """Have two examples checked where an operation has a number of positions per example that is new."""
        for call in calls:
            for name in call.names if call.taken is None else ():
                if self.plan.layouts.get(name) in (Layout.MAJOR, Layout.MINOR):
                    use = name, call.shape[0] / watch.examples
                    if use not in self._positions:
                        self._positions.add(use)
                        watch.rows |= {0, watch.examples - 1}

    def width(self, examples: Examples | None = None) -> int:
        """Roughly how many activations one example has in the network; measured once, when ``examples`` are given."""
        if not self._width and examples is not None:
            like = next(iter(self.task.named_parameters().values()))
            first = self.gradients(next(iter(examples.blocks(0, 1))), checked=False)
            self._width = first.query_bytes(1) // like.element_size()
        return max(1, self._width)

    def weights_of(self, ids: Sequence[int]) -> Tensor | None:
        """[example]: the weights of some examples, on the CPU; None where all have the same."""
        return None if self.weights is None else self.weights[torch.as_tensor(ids)]

    def has_loss(self, block: Block, example: int) -> bool:
        """Whether the loss of one example alone is a finite number."""
        batch = self.task.to_device(block.one(example))
        seed_for(example)
        return bool(self.task(batch).isfinite().all())

    def total(self, block: Block) -> Tensor:
        """The sum of the losses of a block's examples, times their weights, with its autograd graph."""
        batch = self.task.to_device(block.batch)
        seed_for(block.start)
        return self.reduction.total(self.task(batch), block.size, self.weights_of(block.ids))

    def record(
        self,
        block: Block,
        names: Iterable[str],
        copy_leaves: bool,
        watch: SuspectRows | None = None,
        set_random_state: Callable[[], Any] | None = None,
        mixing: MixingWatch | None = None,
    ) -> Tape:
        """Record one forward and one backward pass through the activations, without computing weight gradients.

        Args:
            block: the examples.
            names: of the parameters.
            copy_leaves: see ``Plan``.
            watch: told of each call.
            set_random_state: called before the forward pass.
            mixing: follows what the step computes of its batch.
        """
        parameters = self.task.named_parameters()
        wanted = {name: parameters[name] for name in names}
        tape = Tape(wanted, constants_of(self.task.module), copy_leaves, watch, block.size)
        with requiring_gradients(self.task.module, ()):
            move, step = (self.task.to_device, self.task) if mixing is None else mixing.around(self.task)
            batch = move(block.batch)
            if set_random_state is None:
                seed_for(block.start)
            else:
                set_random_state()
            with tape:
                loss = step(batch)
            total = self.reduction.total(loss, block.size, self.weights_of(block.ids))
            tape.total = total.detach()
            tape.backward(total)
        return tape

    def parts_of(
        self, calls: Sequence[Call], block: Block, layouts: Mapping[str, Layout], separate: frozenset[str]
    ) -> tuple[dict[Names, Part], list[str]]:
        """The parts made from recorded calls, and the parameters whose activations did not fit their layouts."""
        weights = self.weights_of(block.ids)
        uses: dict[Names, list[Part]] = {}
        failed: list[str] = []
        for call in (call.in_float32() for call in calls):
            if call.gradient is None:  # the loss does not depend on it
                continue
            for roles in self._joint_roles(call, layouts, separate):
                for layout in {layouts[name]: None for name in call.sources[roles[0]].names if name in layouts}:
                    taken = [n for role in roles for n in call.sources[role].names if layouts.get(n) is layout]
                    split = Split(block.size, layout, call.taken)
                    try:
                        made = call.rule.parts(call.operands, call.gradient, frozenset(roles), split)
                        made = apart(made) if split.padded else made
                    except LayoutMismatch:
                        failed += taken
                        continue
                    for key, part in made.items():
                        for names, own in self._by_parameters([call.sources[role] for role in key], part, separate):
                            if set(names) <= set(taken):
                                uses.setdefault(names, []).append(own)
        kept = {key: sum_of(of_key) for key, of_key in uses.items() if not set(key) & set(failed)}
        if weights is not None:  # the calls have the gradients of weight × loss
            inverse = onto(torch.where(weights == 0, weights, 1 / weights), self.task.device)
            kept = {key: part.scaled(inverse) for key, part in kept.items()}
        lost = {name for key in uses if key not in kept for name in key} | set(failed)
        return kept, sorted(lost)

    def _joint_roles(
        self, call: Call, layouts: Mapping[str, Layout], separate: frozenset[str]
    ) -> list[tuple[str, ...]]:
        """The roles of a call that may share a part: parameters with the same parameter group and layout."""
        wanted = {r: s for r, s in call.sources.items() if s.value.numel() and not layouts.keys().isdisjoint(s.names)}
        kinds = {(self.groups.get(name, 0), layouts.get(name)) for s in wanted.values() for name in s.names}
        direct = all(type(s) is Source for s in wanted.values())
        if len(kinds) > 1 or not direct or not separate.isdisjoint(call.names):
            return [(role,) for role in wanted]
        return [tuple(wanted)] if wanted else []

    def _by_parameters(
        self, sources: Sequence[Source], part: Part, separate: frozenset[str]
    ) -> Iterator[tuple[Names, Part]]:
        """The parts of the parameters from the part of what is computed from them."""
        if len(sources) > 1 or type(sources[0]) is Source:
            yield tuple(source.names[0] for source in sources), part
            return
        for names, own in carried_back(sources[0], part):
            if len(names) == 1 or (len({self.groups.get(n, 0) for n in names}) == 1 and separate.isdisjoint(names)):
                yield names, own
            else:
                yield from zip(((name,) for name in names), own.per_parameter(), strict=True)


def _without_empty(parts: Mapping[Names, Part], counts: Tensor) -> Mapping[Names, Part]:
    """Zero gradients for examples that do not count; their own may be NaN."""
    if bool(counts.all()):
        return parts
    kept = counts.to(next(iter(parts.values())).like.device)
    return {
        names: DenseRows(tuple(torch.where(kept.view(-1, *[1] * (r.ndim - 1)), r, 0) for r in part.rows))
        if isinstance(part, DenseRows)
        else part
        for names, part in parts.items()
    }
