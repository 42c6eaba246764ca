"""A few examples of a dataset, whose passes alone and together serve all checks that are made before scoring."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from lightning_influence.data.examples import Block, ChosenBlock, Examples, keepable, versions_of
from lightning_influence.devices import widest
from lightning_influence.gradients.digests import Digest, Digester
from lightning_influence.gradients.engine import Engine
from lightning_influence.gradients.general import loss_and_gradient, requiring_gradients
from lightning_influence.gradients.mixing import MixingWatch
from lightning_influence.gradients.reduction import WAY_OUT, Reduction
from lightning_influence.gradients.tape import Tape
from lightning_influence.gradients.token_counts import CountWatch, Key
from lightning_influence.gradients.unlike_rows import UnlikeRows
from lightning_influence.module.mode_reads import ModeReads
from lightning_influence.module.numbers import small_values
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.snapshot import readings_of
from lightning_influence.module.task import Task
from lightning_influence.module.watched_index import Key as OfIndex
from lightning_influence.module.watched_index import WatchedIndex
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.types import Batch

# Two batches of unequal size: the dimension whose size equals the batch size in both holds the examples.
_SIZES = (3, 5)
# Among so many examples the odd ones are looked for, of which so many are run as well.
_READ, _ODD = 32, 4
# A model with more parameters has one batch, of so many examples, with odd ones among them.
_LARGE = 10**6
_FEW, _ODD_OF_FEW = 3, 2
# On so many examples of another dataset a plan is tried that was found right before.
CONFIRMED = 2


@dataclass(frozen=True)
class Alone:
    """What a pass of one example gave; numbers are read from the device with those of other passes.

    Args:
        gradient: None if it was not wanted.
        read_loss: reads the loss of the example.
        read_counts: reads what was counted, see ``CountWatch``.
        read_unequal: reads by cross-entropy whether its class weights are unequal.
    """

    gradient: Digest | None
    read_loss: Callable[[], list[float]]
    read_counts: Mapping[Key, Callable[[], list[float]]]
    read_unequal: Mapping[Key, Callable[[], list[float]]]

    @property
    def loss(self) -> float:
        """The loss of the example."""
        return self.read_loss()[0]

    @property
    def counts(self) -> dict[Key, float]:
        """What was counted."""
        return {key: read()[0] for key, read in self.read_counts.items()}

    @property
    def class_weights(self) -> list[Key]:
        """Which of the counts are of unequal class weights."""
        return [key for key, read in self.read_unequal.items() if read()[0]]


def is_large(task: Task) -> bool:
    """Whether few examples are checked, since a pass of one takes long."""
    return sum(p.numel() for p in task.named_parameters().values()) > _LARGE


class Sample:
    """A few examples at the module's current weights; each pass is made when it is first wanted, and once.

    Args:
        task: the module with its loss.
        examples: the dataset.
        names: the parameters whose gradients will be taken; none: only losses will be.
        trained: whether they are training examples, whose batches have an index, and a step that may count.
        few: of how many to make a single batch; None: by the size of the model.
    """

    def __init__(
        self,
        task: Task,
        examples: Examples,
        names: Sequence[str] = (),
        trained: bool = True,
        few: int | None = None,
    ) -> None:
        self.task, self.examples = task, examples
        self.trained, self._follows_step = trained, trained and task.loss is None
        self.with_gradients = bool(names)
        self._large = not examples.thorough and is_large(task)
        self.few = _FEW if few is None and self._large and names else few
        trainable = [n for n, p in task.named_parameters().items() if p.requires_grad and not p.is_complex()]
        self.names = list(names) or trainable
        self.readings = readings_of(task.module)
        self.digester = Digester(self.readings)
        self.copy_leaves = False
        """Whether activations are copied, since the model writes into them in place."""
        self.uses_of_index: list[OfIndex] = []
        """What the pass of the last block computed from the index of its batch, see ``WatchedIndex``."""
        self.reads_mode = True
        """Whether that pass may have depended on the mode (``self.training``) of the user's modules."""
        self.mixing: MixingWatch | None = None
        """Followed that pass."""
        self.values: list[dict[str, Any]] = []
        """The module's small values before and after the pass of the last block."""
        self._alone: dict[int, Alone] = {}
        self._losses: dict[tuple[int, ...], Callable[[], list[float]]] = {}
        self._gradients: dict[tuple[int, ...], Digest] = {}
        self._batches: dict[tuple[int, ...], tuple[Batch, list[int]]] = {}

    # ---- which examples -------------------------------------------------------------------------------------------

    @cached_property
    def chosen(self) -> list[list[int]]:
        """The ids of two batches of examples spread over the dataset, with repetition if it is tiny; or of one."""
        n = len(self.examples)
        if self.few is not None:
            some = list(dict.fromkeys([*self.odd, *evenly_spread(n, self.few)]))
            return [[some[i % len(some)] for i in range(self.few)]]
        # Not `evenly_spread`: always this many, and other examples in the second batch than in the first.
        return [[(round((i + 0.5 * b) * n / size)) % n for i in range(size)] for b, size in enumerate(_SIZES)]

    @property
    def compared(self) -> list[dict[int, int]]:
        """By block: the ids of the rows that are compared with passes alone; of the few of a large model the last."""
        first = self.few - 1 if self._large and self.few == CONFIRMED and not self.trained else 0
        return [dict(list(enumerate(ids))[first:]) for ids in self.chosen]

    @property
    def blocks(self) -> list[ChosenBlock]:
        """The same as blocks."""
        return [self._block(ids) for ids in self.chosen]

    def _block(self, ids: Sequence[int]) -> ChosenBlock:
        return ChosenBlock(ids[0], len(ids), self._batch(ids), self.examples.one, ids)

    @cached_property
    def read(self) -> Block | None:
        """Some examples that are only read; None if one of them cannot be, which is met where it is scored."""
        with contextlib.suppress(Exception):
            ids = list(evenly_spread(len(self.examples), _READ))
            self.examples.looked_at = self.examples.looked_at or self.examples.chosen(ids)
        return self.examples.looked_at

    @cached_property
    def odd(self) -> list[int]:
        """Those of them that are most unlike the others."""
        if not self.trained or self.read is None:
            return []
        with contextlib.suppress(Exception):
            rows = UnlikeRows().new(self.read) or {}
            return [self.read.ids[row] for row in rows][: _ODD if self.few is None else _ODD_OF_FEW]
        return []

    @property
    def ids(self) -> list[int]:
        """All examples that are run alone."""
        if not self.with_gradients:
            return list(evenly_spread(len(self.examples), _READ))
        return list(dict.fromkeys([*itertools.chain(*self.chosen), *self.odd]))

    # ---- passes ---------------------------------------------------------------------------------------------------

    def alone(self, example: int, gradient: bool | None = None) -> Alone:
        """A pass of one example.

        Args:
            example: its id.
            gradient: whether its gradient is wanted; None: that of the examples in blocks is.
        """
        if gradient is None:
            gradient = self.with_gradients and any(example in ids for ids in self.chosen)
        known = self._alone.get(example)
        if known is None or (gradient and known.gradient is None):
            watch, names = CountWatch(), self.names if gradient else ()
            loss, found = self._pass(self.examples.one(example), example, names, watch)
            digest = self.digester.of(found) if gradient else None
            counts, unequal = ({k: self.readings.later(x) for k, x in of.items()} for of in watch.totals())
            known = self._alone[example] = Alone(digest, self.readings.later(loss), counts, unequal)
        return known

    def losses(self, batches: Iterable[Sequence[int]], plain: bool = False) -> dict[tuple[int, ...], float]:
        """The losses of batches, as the step returned them; the sums of the losses of ``loss=``.

        Args:
            batches: the ids of their examples.
            plain: by passes of their own. Otherwise recorded ones serve, in which no parameter requires a gradient, so
                that a step may compute another loss.
        """
        found = {tuple(ids): self._loss(list(ids), plain) for ids in batches}
        return {ids: read()[0] for ids, read in found.items()}

    def prepare_losses(self, batches: Iterable[Sequence[int]]) -> None:
        """Have the losses of batches read together with those of single examples; see ``losses``."""
        for ids in batches:
            with contextlib.suppress(Exception):  # whoever needs them meets the error
                self._loss(list(ids), False)

    def _of_block(self, ids: list[int]) -> Callable[[], list[float]]:
        """The loss of a block, from its recorded pass."""
        key = (-1, *ids)
        if key not in self._losses:
            self._losses[key] = self.readings.later(self.tapes[self.chosen.index(ids)].total)  # type: ignore[arg-type]
        return self._losses[key]

    def _loss(self, ids: list[int], plain: bool) -> Callable[[], list[float]]:
        if not plain and ids in self.chosen:
            with contextlib.suppress(Exception):  # whoever needs the gradients meets the error
                return self._of_block(ids)
        key = tuple(ids)
        if key not in self._losses:
            self._losses[key] = self.readings.later(self._pass(self._batch(ids), ids[0], ())[0])
        return self._losses[key]

    def gradient(self, ids: Sequence[int]) -> Digest:
        """The gradient of the loss of a batch, by plain autograd."""
        key = tuple(ids)
        if key not in self._gradients:
            loss, found = self._pass(self._batch(ids), ids[0], self.names)
            self._losses[key], self._gradients[key] = self.readings.later(loss), self.digester.of(found)
        return self._gradients[key]

    @cached_property
    def tapes(self) -> list[Tape]:
        """Recorded passes of the blocks, back from their loss as the step returned it."""
        try:
            return self._recorded()
        except RuntimeError as error:
            if "in-place" not in str(error):
                raise
            self.copy_leaves = True
            return self._recorded()

    def _recorded(self) -> list[Tape]:
        self._batches.clear()
        self.mixing, tapes = None, []
        for block in self.blocks:
            watched = self._follows_step and block.chosen == self.chosen[-1]
            with self._noting() if watched else contextlib.nullcontext():
                tape = (self._watched(block) if watched else None) or self._record(self._block(block.chosen))
            tapes.append(tape)
        return tapes

    def _record(self, block: ChosenBlock) -> Tape:
        reduction = Reduction.SUM if self.task.loss is None else Reduction.NONE
        mixing = MixingWatch(block.size, self.mixing)
        engine = Engine(self.task, reduction)
        tape = engine.record(block, self.names, self.copy_leaves, mixing=mixing)
        self.mixing = mixing
        return tape

    def _watched(self, block: ChosenBlock) -> Tape | None:
        """The pass of a block with an index that notes its uses; None if it fails with one that is no plain integer."""
        watched = WatchedIndex(self.task.batch_idx, self.uses_of_index)
        with contextlib.suppress(Exception), self.task.at(watched):  # type: ignore[arg-type]
            return self._record(block)
        self.uses_of_index.append(lambda index: index)  # it may depend on it in any way
        self._batches.clear()  # the step may have written into it
        return None

    def _pass(
        self, batch: Batch, example: int, names: Sequence[str], watch: CountWatch | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its gradient."""
        try:
            if names:
                return loss_and_gradient(self.task, batch, names, example, watch)
            # gradients are enabled, and wanted of the same parameters: a step may use them, or ask which are wanted
            with requiring_gradients(self.task.module, self.names) if self.with_gradients else contextlib.nullcontext():
                batch = self.task.to_device(batch)
                seed_for(example)
                with watch or contextlib.nullcontext():
                    loss = self.task(batch)
            return widest(loss.detach()).sum(), {}
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "Expected the loss of a batch to be the mean or the sum of the losses of its examples, got a "
                f"normalisation layer that uses batch statistics in eval mode: {error}. {WAY_OUT}"
            ) from error

    def _batch(self, ids: Sequence[int]) -> Batch:
        """A batch, read once unless a pass may have written into it."""
        batch, versions = self._batches.get(tuple(ids), (None, []))
        if batch is None or versions != versions_of(batch) or not keepable(batch):
            batch = self.examples.some(ids)
            self._batches[tuple(ids)] = batch, versions_of(batch)
        return batch

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Notes whether a pass inside reads the module's mode, and its small values before and after it."""
        self.task.settle()
        before, after = small_values(self.task.module), list[dict[str, Any]]()
        outer = self.task.on_forward
        self.task.on_forward = lambda: after.append(small_values(self.task.module))
        try:
            with ModeReads(self.task.module) as mode:
                yield
        finally:
            self.task.on_forward = outer
        self.reads_mode = mode.read
        self.values = [before, *after[-1:]]
