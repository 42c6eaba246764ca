"""Small pieces of a question's work, timed for an estimate of the whole."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from lightning_influence.data.examples import Block
from lightning_influence.gradients import Gradients
from lightning_influence.gradients.guard import checks_of
from lightning_influence.processes import Processes
from lightning_influence.setting.setting import Queries, Setting
from lightning_influence.timing import Work, seconds_of, timed


class Samples:
    """Times pieces of a question's work, each at most once: about ten passes of a block of training examples.

    Args:
        setting: the question. Its training examples and queries are read as they are when it is answered.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.examples = setting, setting.examples
        size = min(len(self.examples), self.examples.block_size)
        self._reading = seconds_of(lambda: self.examples.some(range(size))) / size
        self.block: Block = next(self.examples.blocks(0, size))

    @classmethod
    def of(cls, setting: Setting) -> "Samples":
        """Those of a question, which are made once."""
        return setting.state(("samples", setting.examples.block_size), cls, setting)

    def gradients(self) -> Gradients:
        """The gradients of the block, computed now and without checks."""
        return self.setting.engine.gradients(self.block, checked=False)

    @cached_property
    def backward(self) -> float:
        """Seconds of the gradients of one training example in a block of many."""
        return timed(self.gradients) / self.block.size

    @cached_property
    def forward(self) -> float:
        """Seconds of the loss of one training example in a block of many."""
        task = self.setting.task

        def losses() -> None:
            with torch.no_grad():
                task(task.to_device(self.block.batch))

        return timed(losses) / self.block.size

    @cached_property
    def alone(self) -> float:
        """Seconds of the gradients of a training example by itself."""
        one = self.examples.chosen([0])
        return timed(lambda: self.setting.engine.gradients(one, checked=False))

    def with_gradients(self, work: Callable[[Gradients], Any]) -> float:
        """Seconds of work on the gradients of one training example, in a block of many, besides computing them."""
        return max(0.0, timed(lambda: work(self.gradients())) / self.block.size - self.backward)

    def passes(self, passes: float, visits: float = 1.0) -> list[Work]:
        """Gradients of all training examples for so many passes, with all that belongs to them.

        Args:
            passes: over the training examples.
            visits: of each example in a pass.
        """
        backward = Work("gradients", passes * visits * len(self.examples), self.backward)
        return [self.reading(passes), self.checks(), backward]

    def reading(self, passes: float = 1.0) -> Work:
        """Reading the training examples for so many passes: once, if they stay in memory."""
        times = 1.0 if self.examples.keeps(self.block) else passes
        return Work("reading", times * len(self.examples), self._reading / max(1, self.examples.workers))

    def checks(self) -> Work:
        """Comparing some training examples with passes of them alone."""
        return Work("spot checks", checks_of(len(self.examples), self.examples.block_size) + 2, self.alone)


def first_queries(queries: Queries) -> Queries:
    """As many as are computed in one block, for timing."""
    return replace(queries, mean=False)[: queries.examples.block_size]


def first_examples(setting: Setting, count: int) -> Setting:
    """A question of its own on the first training examples alone."""
    examples = setting.examples.first(min(count, len(setting.examples)))
    fresh: dict[str, Any] = {"notes": [], "diagnostics": {}, "_states": {}, "deadline": None, "processes": Processes()}
    return replace(setting, examples=examples, ids=range(len(examples)), on_block=lambda count: None, **fresh)
