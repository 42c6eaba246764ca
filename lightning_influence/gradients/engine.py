"""The gradient engine: per-sample gradients of a block of examples at the module's current weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.examples import Block
from lightning_influence.gradients.block import Gradients, Names
from lightning_influence.gradients.general import requiring_gradients, rows_one_by_one, vectorised_rows
from lightning_influence.gradients.layout import Layout, LayoutMismatch
from lightning_influence.gradients.mixed import Mixed
from lightning_influence.gradients.part import Part
from lightning_influence.gradients.reduction import Reduction
from lightning_influence.gradients.tape import Call, Tape
from lightning_influence.module import Task, seed_for


@dataclass(frozen=True)
class Plan:
    """How each trainable parameter's per-sample gradient is computed; the self-check decides.

    Args:
        layouts: parameters with a factored rule, with where the examples stand in their operations.
        vectorised: parameters that go through ``torch.func``.
        one_by_one: parameters that take one backward pass an example.
        apart: parameters whose weight and bias stand in separate parts.
        copy_leaves: the model writes into activations in place.
    """

    layouts: Mapping[str, Layout]
    vectorised: tuple[str, ...] = ()
    one_by_one: tuple[str, ...] = ()
    apart: frozenset[str] = frozenset()
    copy_leaves: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter covered."""
        return (*self.layouts, *self.vectorised, *self.one_by_one)

    def summary(self, parameters: Mapping[str, Tensor]) -> str:
        """One line that names what goes by which path."""
        total = sum(parameters[name].numel() for name in self.names)
        factored = sum(parameters[name].numel() for name in self.layouts)
        text = f"{factored:,} of {total:,} parameters by factored rules"
        for label, names in (("torch.func", self.vectorised), ("one example at a time", self.one_by_one)):
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

    def gradients(self, block: Block) -> Gradients:
        """Per-sample gradients of the plan's parameters, in the cheapest form that each allows."""
        plan = self.plan
        parts: dict[Names, Part] = {}
        late: list[str] = []
        if plan.layouts:
            calls = self.record(block, plan.layouts, plan.copy_leaves)
            parts, late = self.parts_of(calls, block.size, plan.layouts, plan.apart)
        if plan.vectorised:
            rows = vectorised_rows(self.task, block, plan.vectorised)
            parts.update({(name,): part for name, part in rows.items()})
        slow = [*plan.one_by_one, *late]
        if slow:
            parts.update({(n,): part for n, part in rows_one_by_one(self.task, block, slow, self.seed).items()})
        groups = {names: self.groups.get(names[0], 0) for names in parts}
        return Gradients(parts, groups, block.size)

    def record(self, block: Block, names: Sequence[str] | Mapping[str, Layout], copy_leaves: bool) -> list[Call]:
        """One forward and one backward pass through activations only: no weight gradient is formed."""
        parameters = self.task.named_parameters()
        tape = Tape({id(parameters[name]): name for name in names}, copy_leaves)
        with requiring_gradients(self.task.module, ()):
            batch = self.task.to_device(block.batch)
            seed_for(self.seed, block.start)
            with tape:
                loss = self.task(batch)
            total = self.reduction.total(loss, block.size)
            if tape.outputs and total.requires_grad:
                torch.autograd.grad(total, tape.outputs, allow_unused=True)
        return [call for call in tape.calls if call.gradient is not None]

    def parts_of(
        self, calls: Sequence[Call], examples: int, layouts: Mapping[str, Layout], apart: frozenset[str]
    ) -> tuple[dict[Names, Part], list[str]]:
        """The parts that recorded calls yield, and the parameters whose shapes did not fit their layouts."""
        parts: dict[Names, Part] = {}
        failed: list[str] = []
        for call in calls:
            names = {role: name for role, name in call.names.items() if name in layouts}
            for roles in self._together(names, apart):
                layout = layouts[names[min(roles, key=list(names).index)]]
                try:
                    made = call.rule.parts(call.operands, _gradient(call), frozenset(roles), examples, layout)
                except LayoutMismatch:
                    failed += [names[role] for role in roles]
                    continue
                for key, part in made.items():
                    _add(parts, tuple(names[role] for role in key), part)
        kept = {key: part for key, part in parts.items() if not set(key) & set(failed)}
        lost = {name for key in parts if key not in kept for name in key} | set(failed)
        return kept, sorted(lost)

    def _together(self, names: Mapping[str, str], apart: frozenset[str]) -> list[tuple[str, ...]]:
        """Roles of one call that may share a part: those of one parameter group."""
        if len({self.groups.get(name, 0) for name in names.values()}) > 1 or apart & set(names.values()):
            return [(role,) for role in names]
        return [tuple(names)] if names else []


def _gradient(call: Call) -> Tensor:
    if call.gradient is None:
        raise LayoutMismatch("The loss does not depend on this call.")
    return call.gradient


def _add(parts: dict[Names, Part], key: Names, part: Part) -> None:
    if key not in parts:
        parts[key] = part
        return
    parts[key] = parts[key].joined(part) or Mixed((parts[key], part))
