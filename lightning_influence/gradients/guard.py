"""Checks while scoring: that examples weigh in a batch as they do alone, on whatever path their gradients come."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.devices import read_numbers
from lightning_influence.gradients.general import NotVectorisable, loss_and_gradient, vectorised_losses
from lightning_influence.gradients.known_blocks import KnownBlocks
from lightning_influence.gradients.precise import Tolerance, holds_precisely
from lightning_influence.gradients.relation import add_up, losses_add_up, refusal
from lightning_influence.gradients.spot_checks import (
    SuspectRows,
    differing,
    is_finite,
    named_rows,
    rows_of,
    same,
    smallest_scale,
)
from lightning_influence.gradients.unlike_rows import UnlikeRows
from lightning_influence.module.snapshot import read_comparisons, readings_of
from lightning_influence.module.task import Task
from lightning_influence.wording import counted

if TYPE_CHECKING:
    from lightning_influence.gradients.engine import Computed, Engine

# On the first pass over the data at most one example in this many is checked, of blocks 1, 4, 9, 16, ...
_CHECKED = 128
# Of so many different ways in which blocks branch, examples are checked.
_BRANCHES = 16
# Blocks whose checks are read at once, at the latest.
_UNREAD = 1024

Again = Callable[[Sequence[int]], Block]
"""Reads the block of some examples once more."""


def checks_of(examples: int, block: int) -> float:
    """How many examples are checked on a first pass, beside those that are most unlike the others.

    Args:
        examples: how many there are.
        block: how many are in a block.
    """
    return min(examples / _CHECKED, math.sqrt(examples / block))


@dataclass(frozen=True)
class Unread:
    """A block of which a device knows whether its checks hold, and the host does not yet.

    Args:
        ids: the examples.
        made: how many checks were made.
        rows: those to check.
        doubtful: whether a check failed, or there are other rows to check; on the device.
        again: reads the block once more.
    """

    ids: Sequence[int]
    made: int
    rows: Collection[int]
    doubtful: Tensor
    again: Again


@dataclass
class Guard:
    """Chooses the examples to check, repeats in float64 what rounding may have caused, and refuses.

    Devices compute whether checks hold without being waited for, until ``read`` is called.

    Args:
        made: the checks so far.
        repeated: those among them that failed at first and held in float64.
        unlike: finds the examples that are unlike those before.
        dataset: of the examples; None: not known.
        refused: whether one failed.
    """

    made: int = 0
    repeated: int = 0
    unlike: UnlikeRows = field(default_factory=UnlikeRows)
    dataset: Any = None
    refused: bool = False
    _blocks: int = 0
    _next: int = 4
    _new: int = 0
    _before: int = 0
    _waiting: int = 0
    _routine: int = 0
    _unread: list[Unread] = field(default_factory=list)
    _uneven: bool = False
    _branches: set[int] = field(default_factory=set)
    _branched: list[int] = field(default_factory=lambda: [0, 0])
    _known: KnownBlocks = field(default_factory=KnownBlocks)

    def again(self) -> "Guard":
        """For a later question about the same examples: what was checked is not, unless it has changed."""
        return Guard(
            unlike=self.unlike.again(),
            dataset=self.dataset,
            _before=max(self._before, self._new),
            _routine=self._routine,
            _uneven=self._uneven,
            _branches=set(self._branches),
            _branched=list(self._branched),
            _known=self._known.again(),
        )

    def choose(self, block: Block) -> tuple[dict[int, int | None], bool]:
        """The rows of a block to check, each with the id of an example unlike it, and whether the block is new.

        They are those most unlike the examples before, and one each of blocks 1, 4, 9, 16 ... of the first pass, at
        most one in 128 examples, and of blocks 4, 16, 64 ... of later ones.
        """
        unlike = self.unlike.new(block)
        rows: dict[int, int | None] = dict(unlike or {})
        self._blocks += 1
        self._new += unlike is not None
        self._waiting += block.size
        due = self._waiting >= _CHECKED and self._new >= max(self._before + 1, (self._routine + 1) ** 2)
        if self._blocks == self._next or (due and unlike is not None):
            self._next *= 4 if self._blocks == self._next else 1
            self._waiting, self._routine = 0, self._routine + 1
            row = self._blocks * 7919 % block.size
            rows.setdefault(row, self.unlike.other(block.ids[row]))
        return rows, unlike is not None

    def check(
        self,
        engine: "Engine",
        block: Block,
        computed: "Computed",
        rows: Mapping[int, int | None],
        new: bool,
        watch: SuspectRows,
        again: Again | None = None,
    ) -> None:
        """Check a block on the paths that its gradients came by.

        Args:
            engine: whose gradients they are.
            block: the examples.
            computed: their gradients.
            rows: the rows to check, each with the id of an example unlike it, if one is known.
            new: whether the block was not seen before.
            watch: followed the block's pass, and names other rows to check.
            again: reads the block once more, if its checks may be read later; None: they are read at once.

        Raises:
            ValueError: an example weighs otherwise in its batch than alone.
        """
        every, unequal = {*rows, *watch.rows, *self._branching(engine, block, watch)}, watch.unequal
        if engine.plan.reads and block.size > 1:
            every |= self._known.longest(engine, computed)
        if self._blocks == 2:  # where examples are unequal, they are in most blocks
            self.read(engine)
        if again is None:
            self._check_now(engine, block, computed, every, unequal)
        else:
            if self._uneven:
                every, unequal = every | rows_of(unequal), []
            self._check_later(engine, block, computed, every, unequal, again)
        mixing = block.size > 1 and engine.plan.mixing is not None
        if mixing and not self._known.add_up(engine, block, computed.total):
            self._check_losses(engine, block, computed.total, self._losses(engine, block, computed))
            self._known.note(engine, block, computed.total)
        if engine.examples is None or not (computed.slow or engine.plan.vectorised or block.size == 1):
            return
        if new and computed.alone is not None and block.size > 1 and engine.plan.mixing is None:
            self._check_losses(engine, block, computed.total, computed.alone)
        for row, other in rows.items():
            if other is not None and other != block.ids[row]:
                self.check_sum(engine, block, [block.ids[row], other], engine.plan.names)

    def check_sum(self, engine: "Engine", block: Block, ids: Sequence[int], names: Sequence[str]) -> None:
        """Compare the gradient of a batch of training examples with the sum of the gradients of its examples alone.

        Args:
            engine: with ``examples``.
            block: holds the first of them.
            ids: of the examples.
            names: of the parameters.

        Raises:
            ValueError: they differ, also in float64.
        """
        self.made += 1
        if not add_up(engine, ids, names):
            self._repeat(
                engine,
                lambda task, tolerance: add_up(replace(engine, task=task), ids, names, tolerance),
                lambda: refusal(engine, block, list(block.ids).index(ids[0]), names),
            )

    def _branching(self, engine: "Engine", block: Block, watch: SuspectRows) -> set[int]:
        """The first and last row of a block whose pass took a way that none before took."""
        known = self._branches.union(*engine.plan.branches)
        new = [i for i, branch in enumerate(watch.branch) if branch not in known and self._branched[i] < _BRANCHES]
        for i in new:
            self._branched[i] += 1
            self._branches.add(watch.branch[i])
        return {0, block.size - 1} if new else set()

    def _losses(self, engine: "Engine", block: Block, computed: "Computed") -> Tensor | None:
        """[example]: the losses of a block's examples alone."""
        if computed.alone is not None:
            return computed.alone
        with contextlib.suppress(NotVectorisable):
            return None if engine.plan.mixed_before else vectorised_losses(engine.task, block)
        return None

    def note(self) -> str | None:
        """A sentence about the checks that were repeated; None if there were none."""
        if not self.repeated:
            return None
        made = counted(self.made, "example")
        return (
            f"Gradients of {made} were compared with those of the example alone: {self.repeated} differed by rounding "
            "errors, and agree in float64."
        )

    def _check_now(
        self, engine: "Engine", block: Block, computed: "Computed", rows: Collection[int], unequal: Sequence[Tensor]
    ) -> None:
        """Check rows, and those that ``unequal`` names, with a single wait where all is well; see ``_check_rows``."""
        agree = self._agreeing(engine, block, computed, rows)
        numbers = read_numbers([*agree, *unequal])
        more = named_rows(numbers[len(agree) :]).difference(rows)
        self._uneven |= bool(named_rows(numbers[len(agree) :]))
        if more or not all(right for (right,) in numbers[: len(agree)]):
            self.made -= len(agree)
            self._check_rows(engine, block, computed, {*rows, *more})

    def _agreeing(self, engine: "Engine", block: Block, computed: "Computed", rows: Collection[int]) -> list[Tensor]:
        """Whether the gradients of rows are those of the examples alone, where they are computed."""
        names = _names(engine, computed)
        tolerance = engine.task.tolerance
        found = [same(computed.row(r), _alone(engine, block, r, names), tolerance) for r in (rows if names else ())]
        self.made += len(found)
        return found

    def _check_later(
        self,
        engine: "Engine",
        block: Block,
        computed: "Computed",
        rows: Collection[int],
        unequal: Sequence[Tensor],
        again: Again,
    ) -> None:
        """Compute whether a block is to be looked at; see ``_check_rows``."""
        agree = self._agreeing(engine, block, computed, rows)
        doubts = [*(~right for right in agree), *(differ.bool() for differ, *_ in unequal)]
        if doubts:
            self._unread.append(Unread(block.ids, len(agree), rows, torch.stack(doubts).any(), again))
        if len(self._unread) >= _UNREAD:
            self.read(engine)

    def read(self, engine: "Engine") -> None:
        """Read whether the checks so far hold, with a single wait; blocks in doubt are computed once more.

        Raises:
            ValueError: an example weighs otherwise in its batch than alone.
        """
        unread, self._unread = self._unread, []
        doubtful = readings_of(engine.task.module).read([each.doubtful for each in unread])
        read_comparisons(engine.task.module)
        for each in (each for each, (doubt,) in zip(unread, doubtful, strict=True) if doubt):
            block = each.again(each.ids)
            watch = SuspectRows(block.size)
            computed, unequal = engine.in_block(block, watch), rows_of(watch.unequal)
            self._uneven |= bool(unequal)
            self.made -= each.made
            self._check_rows(engine, block, computed, {*each.rows, *unequal})

    def _check_rows(self, engine: "Engine", block: Block, computed: "Computed", rows: Iterable[int]) -> None:
        """Compare the gradients of some rows of a block with those of the examples alone."""
        names = _names(engine, computed)
        failed: list[int] = []
        todo = sorted(rows) if names else []
        while todo:
            row = todo.pop()
            truth = _alone(engine, block, row, names)
            self.made += 1
            mine = computed.row(row)
            if not is_finite(truth) and is_finite(mine) and row + 1 < block.size:
                todo.append(row + 1)  # an example without labels: the others show what it weighs
            if differing(mine, truth, engine.task.tolerance):
                failed.append(row)
        if not failed:
            return

        def holds(task: Task, tolerance: Tolerance) -> bool:
            other = replace(engine, task=task)
            again = other.in_block(block)
            values = list(task.named_parameters(names).values())

            def differs(row: int) -> bool:
                loss, truth = _pass_alone(other, block, row, names)
                scale = smallest_scale(loss, values)
                return differing(again.row(row), truth, tolerance or task.tolerance, scale) is not None

            return not any(differs(row) for row in failed)

        self._repeat(engine, holds, lambda: refusal(engine, block, failed[0], names))

    def _check_losses(self, engine: "Engine", block: Block, total: Tensor | None, alone: Tensor | None) -> None:
        """Compare the loss of a block with the losses of its examples alone."""
        self.made += 1
        if not losses_add_up(engine, block, total, alone):
            row = 0 if alone is None else int(alone.nan_to_num(0.0).abs().argmax())
            self._repeat(
                engine,
                lambda task, tolerance: losses_add_up(replace(engine, task=task), block, None, None, tolerance),
                lambda: refusal(engine, block, row, engine.plan.names),
            )

    def _repeat(
        self, engine: "Engine", holds: Callable[[Task, Tolerance], bool], refused: Callable[[], ValueError]
    ) -> None:
        if not holds_precisely(engine.task, holds):
            self.refused = True
            raise refused()
        self.repeated += 1


def _names(engine: "Engine", computed: "Computed") -> list[str]:
    """The parameters whose gradients are compared with those of examples alone."""
    compared = engine.plan.layouts or engine.plan.vectorised
    return [name for name in engine.plan.names if name not in computed.slow] if compared else []


def _alone(engine: "Engine", block: Block, row: int, names: Sequence[str]) -> dict[str, Tensor]:
    return _pass_alone(engine, block, row, names)[1]


def _pass_alone(engine: "Engine", block: Block, row: int, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one example alone, and its gradient."""
    example = block.ids[row]
    return loss_and_gradient(engine.task, block.one(example), names, example)
