"""Checks while scoring: that examples weigh in a batch as they do alone, on whatever path their gradients come."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_influence.data.examples import Block
from lightning_influence.gradients.general import one_gradient
from lightning_influence.gradients.precise import Tolerance, holds_precisely
from lightning_influence.gradients.relation import add_up, losses_add_up, refusal
from lightning_influence.gradients.spot_checks import differing, is_finite
from lightning_influence.gradients.unlike_rows import UnlikeRows
from lightning_influence.module.task import Task

if TYPE_CHECKING:
    from lightning_influence.gradients.engine import Computed, Engine

# On the first pass over the data, one example in this many is checked, and then one in a share of those before.
_CHECKED, _SHARE = 128, 16


def checks_of(examples: int) -> float:
    """How many examples are checked on a first pass over so many, beside those that are most unlike the others."""
    first = _CHECKED * _SHARE
    return examples / _CHECKED if examples <= first else _SHARE * (1 + math.log(examples / first))


@dataclass
class Guard:
    """Chooses the examples to check, repeats in float64 what rounding may have caused, and refuses.

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
    _start: int = 0
    _waiting: int = 0

    def again(self) -> "Guard":
        """For a later question about the same examples: what was checked is not, unless it has changed."""
        return Guard(unlike=self.unlike.again(), dataset=self.dataset, _start=self._start)

    def choose(self, block: Block) -> tuple[dict[int, int | None], bool]:
        """The rows of a block to check, each with the id of an example unlike it, and whether the block is new.

        They are those most unlike the examples before, one in 128 examples on the first pass (of the 2,048th on, one in
        a sixteenth of those before), and one each of blocks 4, 16, 64 ...
        """
        unlike = self.unlike.new(block)
        rows: dict[int, int | None] = dict(unlike or {})
        self._blocks += 1
        self._waiting += block.size
        if self._blocks == self._next or (
            block.start >= self._start and self._waiting >= max(_CHECKED, block.start // _SHARE)
        ):
            self._next *= 4 if self._blocks == self._next else 1
            self._start, self._waiting = block.start + 1, 0
            row = self._blocks * 7919 % block.size
            rows.setdefault(row, self.unlike.other(block.ids[row]))
        return rows, unlike is not None

    def check(
        self, engine: "Engine", block: Block, computed: "Computed", rows: Mapping[int, int | None], new: bool
    ) -> None:
        """Check a block on the paths that its gradients came by.

        Args:
            engine: whose gradients they are.
            block: the examples.
            computed: their gradients.
            rows: the rows to check, each with the id of an example unlike it, if one is known.
            new: whether the block was not seen before.

        Raises:
            ValueError: an example weighs otherwise in its batch than alone.
        """
        self._check_rows(engine, block, computed, rows)
        if engine.examples is None or not (computed.slow or engine.plan.vectorised or block.size == 1):
            return
        if new and computed.alone is not None and block.size > 1:
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

    def note(self) -> str | None:
        """A sentence about the checks that were repeated; None if there were none."""
        if not self.repeated:
            return None
        return f"{self.repeated} of {self.made} spot checks failed by rounding errors: repeated in float64, they hold."

    def _check_rows(self, engine: "Engine", block: Block, computed: "Computed", rows: Iterable[int]) -> None:
        """Compare the gradients of some rows of a block with those of the examples alone."""
        names = [name for name in engine.plan.names if name not in computed.slow]
        failed: list[int] = []
        todo = sorted(rows) if engine.plan.layouts or engine.plan.vectorised else []
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
            allowed = tolerance or task.tolerance
            return not any(differing(again.row(r), _alone(other, block, r, names), allowed) for r in failed)

        self._repeat(engine, holds, lambda: refusal(engine, block, failed[0], names))

    def _check_losses(self, engine: "Engine", block: Block, total: Tensor | None, alone: Tensor) -> None:
        """Compare the loss of a block with the losses of its examples alone."""
        self.made += 1
        if not losses_add_up(engine, block, total, alone):
            self._repeat(
                engine,
                lambda task, tolerance: losses_add_up(replace(engine, task=task), block, None, None, tolerance),
                lambda: refusal(engine, block, 0, engine.plan.names),
            )

    def _repeat(
        self, engine: "Engine", holds: Callable[[Task, Tolerance], bool], refused: Callable[[], ValueError]
    ) -> None:
        if not holds_precisely(engine.task, holds):
            self.refused = True
            raise refused()
        self.repeated += 1


def _alone(engine: "Engine", block: Block, row: int, names: Sequence[str]) -> dict[str, Tensor]:
    example = block.ids[row]
    return one_gradient(engine.task, block.one(example), names, engine.seed, example)
