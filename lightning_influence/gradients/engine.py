"""The gradient engine: per-sample gradients of a block of examples at the module's current weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_influence.data.examples import Block, Examples
from lightning_influence.gradients.block import Gradients, Names
from lightning_influence.gradients.general import (
    NotVectorisable,
    one_gradient,
    requiring_gradients,
    rows_one_by_one,
    vectorised_rows,
)
from lightning_influence.gradients.layout import Layout, LayoutMismatch
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.reduction import Reduction
from lightning_influence.gradients.spot_checks import SuspectRows, refuse_difference
from lightning_influence.gradients.sum_of_parts import SumOfParts
from lightning_influence.gradients.tape import Call, Tape, Use
from lightning_influence.module.task import Task, seed_for

# On the first pass over the data one example is looked at in as many as these.
_CHECKED = 128


@dataclass(frozen=True)
class Plan:
    """How each trainable parameter's per-sample gradient is computed; the self-check decides.

    Args:
        layouts: parameters with a factored rule, with where the examples stand in their operations.
        vectorised: parameters that go through ``torch.func``.
        one_by_one: parameters that take one backward pass an example.
        apart: parameters whose weight and bias stand in separate parts.
        copy_leaves: the model writes into activations in place.
        uses: the functions that each parameter was handed to.
        unreached: parameters that the loss does not depend on.
    """

    layouts: Mapping[str, Layout]
    vectorised: tuple[str, ...] = ()
    one_by_one: tuple[str, ...] = ()
    apart: frozenset[str] = frozenset()
    copy_leaves: bool = False
    uses: frozenset[Use] = frozenset()
    unreached: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter covered."""
        return (*self.layouts, *self.vectorised, *self.one_by_one, *self.unreached)

    def summary(self, parameters: Mapping[str, Tensor]) -> str:
        """One line that names what goes by which path."""
        total = sum(parameters[name].numel() for name in self.names)
        factored = sum(parameters[name].numel() for name in self.layouts)
        text = f"{factored:,} of {total:,} parameters by factored rules"
        for label, names in (
            ("torch.func", self.vectorised),
            ("one example at a time", self.one_by_one),
            ("no path, the loss does not reach them", self.unreached),
        ):
            if names:
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                text += f"; by {label}: {shown}"
        return text


@dataclass
class Engine:
    """Per-sample gradients of a task, following a plan.

    Args:
        task: the quiet module.
        reduction: how a batch's loss relates to those of its examples.
        groups: the optimizer's parameter group by parameter name.
        seed: of the random state under which an example's loss is taken.
    """

    task: Task
    reduction: Reduction
    groups: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    plan: Plan = field(default_factory=lambda: Plan({}))
    _blocks: int = 0
    _next: int = 4
    _checked: int = 0
    _unchecked: int = 0
    _width: int = 0
    _positions: set[tuple[str, float]] = field(default_factory=set)

    @property
    def vector_bytes(self) -> int:
        """Of one number for every entry of the plan's parameters, in their own precision."""
        parameters = self.task.named_parameters()
        return sum(parameters[name].numel() * parameters[name].element_size() for name in self.plan.names)

    def gradients(self, block: Block, as_drawn: Callable[[], Any] | None = None) -> Gradients:
        """Per-sample gradients of the plan's parameters, in the cheapest form that each allows.

        Args:
            block: the examples.
            as_drawn: sets the random state of the joint forward pass, of which examples then have gradients that no
                pass of one example alone repeats; there are no spot checks.

        Raises:
            ValueError: a spot check found an example whose gradient in its batch is not its own; with ``as_drawn``, a
                parameter that takes passes of single examples.
        """
        plan, watch = self.plan, None if as_drawn else SuspectRows(block.size)
        parts: dict[Names, Part] = {}
        slow = list(plan.one_by_one)
        if plan.layouts or plan.unreached:
            tape = self.record(block, plan.names, plan.copy_leaves, watch, as_drawn)
            unseen = {name for name, _ in tape.uses - plan.uses}
            layouts = {n: layout for n, layout in plan.layouts.items() if n not in unseen}
            parts, late = self.parts_of(tape.calls, block.size, layouts, plan.apart)
            reached = unseen.union(*(call.names.values() for call in tape.calls if call.gradient is not None))
            slow += [*late, *(n for n in plan.layouts if n in unseen), *(n for n in plan.unreached if n in reached)]
            if watch is not None:
                self._note_positions(tape.calls, watch)
        if as_drawn is not None and (plan.vectorised or slow):
            raise ValueError(
                f"Expected parameters whose gradients divide among the examples of a batch, got "
                f"`{', '.join((*plan.vectorised, *slow)[:5])}` with a pass for each example, which is not what the "
                "example did in its batch, with the batch's random numbers (dropout) and sizes. Pass `loss=`, a "
                "callable (module, batch) -> [batch] of per-sample losses."
            )
        if plan.vectorised:
            try:
                rows = vectorised_rows(self.task, block, plan.vectorised)
                parts.update({(name,): part for name, part in rows.items()})
            except NotVectorisable:
                slow += plan.vectorised
        if slow:
            parts.update({(n,): part for n, part in rows_one_by_one(self.task, block, slow, self.seed).items()})
        groups = {names: self.groups.get(names[0], 0) for names in parts}
        gradients = Gradients(parts, groups, block.size)
        if watch is not None:
            self._spot_check(block, gradients, watch)
        return gradients

    def _note_positions(self, calls: Sequence[Call], watch: SuspectRows) -> None:
        """A number of positions an example that was not met before is worth a look."""
        for call in calls:
            for name in call.names.values():
                if self.plan.layouts.get(name) in (Layout.MAJOR, Layout.MINOR):
                    use = name, call.shape[0] / watch.examples
                    if use not in self._positions:
                        self._positions.add(use)
                        watch.rows |= {0, watch.examples - 1}

    def _spot_check(self, block: Block, gradients: Gradients, watch: SuspectRows) -> None:
        """Looks at what the watch points out, at one in 128 examples on the first pass, and at blocks 4, 16, 64 ..."""
        self._blocks += 1
        self._unchecked += block.size
        if self._blocks == self._next or (block.start >= self._checked and self._unchecked >= _CHECKED):
            self._next *= 4 if self._blocks == self._next else 1
            self._checked, self._unchecked = block.start + 1, 0
            watch.rows.add(self._blocks * 7919 % block.size)
        if not self.plan.layouts:
            return
        for row in sorted(watch.rows):
            example = block.ids[row]
            truth = one_gradient(self.task, block.one(example), self.plan.names, self.seed, example)
            refuse_difference(gradients, row, truth, example)

    def width(self, examples: Examples | None = None) -> int:
        """Numbers that one example's passage through the network makes, roughly: measured once, where there are any."""
        if not self._width and examples is not None:
            like = next(iter(self.task.named_parameters().values()))
            first = self.gradients(next(iter(examples.blocks(0, 1))))
            self._width = first.query_bytes(1) // like.element_size()
        return max(1, self._width)

    def total(self, block: Block) -> Tensor:
        """The sum of a block's losses, with its graph."""
        batch = self.task.to_device(block.batch)
        seed_for(self.seed, block.start)
        return self.reduction.total(self.task(batch), block.size)

    def record(
        self,
        block: Block,
        names: Iterable[str],
        copy_leaves: bool,
        watch: SuspectRows | None = None,
        as_drawn: Callable[[], Any] | None = None,
    ) -> Tape:
        """One forward and one backward pass through activations only: no weight gradient is formed."""
        parameters = self.task.named_parameters()
        tape = Tape({id(parameters[name]): name for name in names}, copy_leaves, watch)
        with requiring_gradients(self.task.module, ()):
            batch = self.task.to_device(block.batch)
            if as_drawn is None:
                seed_for(self.seed, block.start)
            else:
                as_drawn()
            with tape:
                loss = self.task(batch)
            tape.backward(self.reduction.total(loss, block.size))
        return tape

    def parts_of(
        self, calls: Sequence[Call], examples: int, layouts: Mapping[str, Layout], apart: frozenset[str]
    ) -> tuple[dict[Names, Part], list[str]]:
        """The parts that recorded calls yield, and the parameters whose shapes did not fit their layouts."""
        uses: dict[Names, list[Part]] = {}
        failed: list[str] = []
        for call in calls:
            if call.gradient is None:  # the loss does not depend on it
                continue
            names = {role: name for role, name in call.names.items() if name in layouts}
            for roles in self._together(names, layouts, apart):
                layout = layouts[names[roles[0]]]
                try:
                    made = call.rule.parts(call.operands, call.gradient, frozenset(roles), examples, layout)
                except LayoutMismatch:
                    failed += [names[role] for role in roles]
                    continue
                for key, part in made.items():
                    uses.setdefault(tuple(names[role] for role in key), []).append(part)
        kept = {key: _sum(of_key) for key, of_key in uses.items() if not set(key) & set(failed)}
        lost = {name for key in uses if key not in kept for name in key} | set(failed)
        return kept, sorted(lost)

    def _together(
        self, names: Mapping[str, str], layouts: Mapping[str, Layout], apart: frozenset[str]
    ) -> list[tuple[str, ...]]:
        """Roles of one call that may share a part: those of one parameter group and layout."""
        kinds = {(self.groups.get(name, 0), layouts[name]) for name in names.values()}
        if len(kinds) > 1 or apart & set(names.values()):
            return [(role,) for role in names]
        return [tuple(names)] if names else []


def _sum(parts: Sequence[Part]) -> Part:
    """All uses of one parameter as one; halves of halves, so that the steps of a sequence are copied a few times."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    left, right = _sum(parts[:half]), _sum(parts[half:])
    return left.joined(right) or SumOfParts((left, right))
