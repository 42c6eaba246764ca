"""The module in training, as it was in the fit: the loss of a captured micro-batch and its derivatives."""

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_influence.data.examples import Block, Examples, versions_of
from lightning_influence.gradients import Engine, Gradients, Reduction
from lightning_influence.gradients.general import math_attention, requiring_gradients
from lightning_influence.gradients.hessian import gradient_of
from lightning_influence.gradients.reduction import match_loss, refuse_batch_statistics, refuse_mixing
from lightning_influence.module.task import Task
from lightning_influence.replay.attention import attention_gap
from lightning_influence.replay.random_states import put_back
from lightning_influence.replay.steps import MicroBatch, Step
from lightning_influence.types import bytes_in, foreign

_KEPT_BYTES = 2**28
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Drawn(Block):
    """Examples as they were drawn together."""

    drawn: Sequence[int] = ()

    @property
    def ids(self) -> Sequence[int]:  # type: ignore[override]
        """Indices into the dataset."""
        return self.drawn


class Forward:
    """Losses and gradients of micro-batches at the module's present weights.

    Args:
        engine: with the plan of the self-check.
        examples: the training dataset.
    """

    def __init__(self, engine: Engine, examples: Examples) -> None:
        self.engine, self.task, self.examples = engine, engine.task, examples
        self.joint = engine.reduction is Reduction.NONE
        """Whether ``loss=`` gives the losses of every example of a joint batch."""
        self.mean = engine.reduction is not Reduction.SUM
        self._checked: set[bool] = set()
        self._kept: dict[Hashable, tuple[Any, list[int]]] = {}
        self._kept_left = _KEPT_BYTES
        self.attention: float | None = None
        """Where the fit's attention ran in a fused kernel: see ``attention_gap``, of a step's first micro-batch."""
        self.written: dict[str, Tensor] = {}
        """Buffers that the forward passes since the last step wrote into."""

    @contextlib.contextmanager
    def training(self, eval_modules: Sequence[str]) -> Iterator[None]:
        """The module in the modes of the fit, its attention in the kernel that has second derivatives."""
        module = self.task.module
        recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
        module.train()
        for name in eval_modules:
            module.get_submodule(name).training = False
        self.task.remember()
        self.task.on_forward = self._note_buffers
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(math_attention())
                if recurrent:  # neither library has second derivatives of its recurrent layers
                    stack.enter_context(torch.backends.cudnn.flags(enabled=False))
                    stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                yield
        finally:
            self.task.on_forward = None
            module.eval()
            self.task.remember()

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """In the middle of a replay, the module in eval mode, as queries are looked at."""
        modes = [(part, part.training) for part in self.task.module.modules()]
        self.task.module.eval()
        self.task.on_forward = None
        self.task.remember()
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            self.task.remember()
            self.task.on_forward = self._note_buffers

    def parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the module's parameters by name."""
        parameters = self.task.named_parameters()
        return {name: parameters[name] for name in names}

    def share(self, batch: MicroBatch, step: Step) -> float:
        """What an example's loss is multiplied with in the step's gradient."""
        return 1.0 / (step.divisor * ((batch.size or len(batch.ids)) if self.mean else 1))

    def losses(self, batch: MicroBatch, on_device: Any = None) -> Tensor:
        """The joint batch's losses, [example] where ``loss=`` is given, else the scalar of ``training_step``."""
        on_device = self.read(batch) if on_device is None else on_device
        put_back(batch.random, self.task.device)
        losses = self.task(on_device)
        if self.joint and len(losses) != len(batch.ids):
            raise ValueError(
                f"Expected `loss=` to return {len(batch.ids)} losses for {len(batch.ids)} examples, got {len(losses)}."
            )
        return losses

    def total(self, batch: MicroBatch, step: Step) -> Tensor:
        """What the fit called backward on."""
        losses = self.losses(batch)
        if self.joint:
            return losses.sum() * self.share(batch, step)
        return losses * (self.share(batch, step) * (len(batch.ids) if self.mean else 1))

    def gradients(
        self, step: Step, weights: Tensor | None = None, renormalize: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The step's gradients before clipping, by name, without those that the loss does not reach; buffers written.

        Args:
            step: whose micro-batches.
            weights: [train] of the examples' losses; None: all 1.
            renormalize: divide a micro-batch by the sum of its weights in place of its size.
        """
        total: dict[str, Tensor] = {}
        self.written = {}
        for batch in step.batches:
            found = self._plain(batch, step) if weights is None else self._weighted(batch, step, weights, renormalize)
            for name, gradient in found.items():
                total[name] = total[name] + gradient if name in total else gradient
            self._keep_buffers()
        if not step.batches:  # nobody counts, but momentum and weight decay go on
            parameters = self.task.named_parameters()
            reached = [name for name in step.moves.options if name not in self.engine.plan.unreached]
            total = {name: torch.zeros_like(parameters[name]) for name in reached}
        return total, self.written

    def rows(self, batch: MicroBatch, as_drawn: bool = True) -> Gradients:
        """Gradients of the examples' own losses in the joint forward pass.

        Args:
            batch: of which examples.
            as_drawn: under the random state of the fit, in place of the example's own.
        """
        block = Drawn(batch.ids[0], len(batch.ids), self._batch(batch), self._one_of(batch), batch.ids)
        draws: Callable[[], Any] | None = None
        twice = bool(batch.read) and len(set(batch.ids)) < len(batch.ids)  # an id does not tell which of its two looks
        if (batch.random and as_drawn) or twice:
            draws = lambda: put_back(batch.random, self.task.device)  # noqa: E731
        return self.engine.gradients(block, draws)

    def again(self) -> "Forward":
        """The same, for other parts of the batches: what was checked need not be checked again."""
        other = copy.copy(self)
        other._kept, other._kept_left, other.written = {}, _KEPT_BYTES, {}
        return other

    def read(self, batch: MicroBatch) -> Any:
        """The collated micro-batch on the device."""
        return self.task.to_device(self._batch(batch))

    def check(self, step: Step, separate: bool) -> bool:
        """Looks once at what the losses of a batch are to its examples when the module trains.

        Args:
            step: the module stands before it.
            separate: whether examples must be told apart.

        Returns:
            Whether there were forward passes, which may have written into buffers.

        Raises:
            ValueError: a forward pass that mixes examples, without ``loss=``; a ``loss=`` that is not the fit's.
        """
        if separate in self._checked or (self.joint and self._checked):
            return False
        if not self._checked:
            self.attention = attention_gap(lambda: self._plain(step.batches[0], step))
        self._checked.add(separate)
        if self.joint:
            self._match_loss(step)
        elif separate:
            self._refuse_mixing(step)
        return True

    def _plain(self, batch: MicroBatch, step: Step) -> dict[str, Tensor]:
        moved = self.parameters(step.moves.options)
        with requiring_gradients(self.task.module, list(moved)):
            return gradient_of(self.total(batch, step), moved)

    def _weighted(self, batch: MicroBatch, step: Step, weights: Tensor, renormalize: bool) -> dict[str, Tensor]:
        own = weights[list(batch.ids)].to(self.task.device)
        factor = example_factors(own, renormalize and self.mean) * self.share(batch, step)
        if not self.joint:
            rows = self.rows(batch)
            scaled = rows.scaled(dict.fromkeys(rows.parts, factor))
            return {name: gradient for name, gradient in scaled.total().items() if name in step.moves.options}
        moved = self.parameters(step.moves.options)
        with requiring_gradients(self.task.module, list(moved)):
            losses = self.losses(batch)
            return gradient_of((losses * factor.to(losses)).sum(), moved)

    def _one_of(self, batch: MicroBatch) -> Callable[[int], Any]:
        """Gives an example of a micro-batch as a batch of one, as it was read in the fit where that is known."""

        def one(example: int) -> Any:
            put_back(batch.read, _CPU)
            return self.examples.as_read(batch.ids, batch.ids.index(example))

        return one if batch.read else self.examples.one

    def _batch(self, batch: MicroBatch) -> Any:
        key = batch.ids, *batch.read.items()
        kept, versions = self._kept.get(key, (None, None))
        if versions is not None and versions == versions_of(kept):  # no step wrote into it
            return kept
        if batch.read:
            put_back(batch.read, _CPU)
            found = self.examples.as_read(batch.ids)
        else:
            found = self.examples.some(batch.ids)
        size = bytes_in(found)
        if versions is None and size <= self._kept_left and not any(foreign(leaf) for leaf in tree_leaves(found)):
            self._kept_left -= size
            self._kept[key] = found, versions_of(found)
        return found

    def _note_buffers(self) -> None:
        self.written = {name: buffer.detach().clone() for name, buffer in self.task.named_buffers().items()}

    def _keep_buffers(self) -> None:
        """The next micro-batch of the step finds the buffers as this one left them."""
        buffers = self.task.named_buffers()
        for name, value in self.written.items():
            buffers[name].data = value.clone()

    def _match_loss(self, step: Step) -> None:
        """Whether the step takes the mean or the sum of ``loss=``: where it can be asked, it must be one of them."""
        batch = step.batches[0]
        try:
            own = Task(self.task.module, None, self.task.device, self.task.trainer)
        except (TypeError, ValueError):  # manual optimization: the mean, until the weights say otherwise
            return
        with torch.no_grad():
            losses = self.losses(batch)
            put_back(batch.random, self.task.device)
            value = float(own(self.read(batch)))
        self.mean = match_loss(losses, value)

    def _refuse_mixing(self, step: Step) -> None:
        refuse_batch_statistics(self.task.module)
        batch = step.batches[0]
        if batch.random or (self.examples.draws and not batch.read):  # an example alone would draw other numbers
            return
        with torch.no_grad():
            joint = float(self.losses(batch))
            one = self._one_of(batch)
            singles = [float(self.task(self.task.to_device(one(example)))) for example in batch.ids]
        refuse_mixing(singles, joint, self.mean)


def example_factors(weights: Tensor, renormalize: bool) -> Tensor:
    """What the weights of a micro-batch's examples, [..., example], multiply their shares with."""
    if not renormalize:
        return weights
    total = weights.sum(-1, keepdim=True)
    return weights * weights.shape[-1] / torch.where(total == 0, torch.ones_like(total), total)
