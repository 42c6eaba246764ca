"""The module as it ran during the fit: the loss of a captured micro-batch and its gradients."""

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.data.examples import ChosenBlock, Examples, keepable, versions_of
from lightning_influence.devices import onto, read_numbers
from lightning_influence.gradients import Engine, Gradients, Reduction
from lightning_influence.gradients.general import math_attention, requiring_gradients
from lightning_influence.gradients.hessian import gradient_of
from lightning_influence.gradients.reduction import match_loss, refuse_batch_statistics, refuse_mixing
from lightning_influence.replay.attention import attention_gap
from lightning_influence.replay.random_states import put_back
from lightning_influence.replay.steps import MicroBatch, Step
from lightning_influence.types import bytes_in

_KEPT_BYTES = 2**28
_CPU = torch.device("cpu")


class Forward:
    """Losses and gradients of micro-batches at the module's current weights.

    Args:
        engine: holds the plan of the self-check.
        examples: the training dataset.
    """

    def __init__(self, engine: Engine, examples: Examples) -> None:
        self.engine, self.task, self.examples = engine, engine.task, examples
        self.joint = engine.reduction is Reduction.NONE
        """Whether ``loss=`` gives the losses of all examples of a joint batch."""
        self.mean = engine.reduction is not Reduction.SUM
        self._checked: set[bool] = set()
        self._kept: dict[Hashable, tuple[Any, list[int]]] = {}
        self._kept_left = _KEPT_BYTES
        self.attention: float | None = None
        """``attention_gap`` of a step's first micro-batch; None where the fit's attention ran in no fused kernel."""
        self.written: dict[str, Tensor] = {}
        """Buffers after the forward passes since the last step, by name."""

    @contextlib.contextmanager
    def training(self, eval_modules: Sequence[str]) -> Iterator[None]:
        """Puts the module into the modes of the fit, and its attention into the kernel that has second derivatives.

        Args:
            eval_modules: names of the modules that were in eval mode.
        """
        module = self.task.module
        module.train()
        for name in eval_modules:
            module.get_submodule(name).training = False
        self.task.remember()
        self.task.on_forward, self.task.exact = self._note_buffers, False
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.task.in_full())
                stack.enter_context(math_attention())
                if self.task.kernels.recurrent:  # without second derivatives there; a task does without cuDNN's
                    stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                yield
        finally:
            self.task.on_forward, self.task.exact = None, True
            module.eval()
            self.task.remember()

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Puts the module into eval mode in the middle of a replay, to compute gradients of queries."""
        modes = [(part, part.training) for part in self.task.module.modules()]
        self.task.module.eval()
        self.task.on_forward, self.task.exact = None, True
        self.task.remember()
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            self.task.remember()
            self.task.on_forward, self.task.exact = self._note_buffers, False

    def share(self, batch: MicroBatch, step: Step) -> float | Tensor:
        """The factor of an example's loss in the step's gradient; [example] where a loss is a mean over tokens."""
        if self.engine.weights is None:
            return 1.0 / (step.divisor * (len(batch.drawn or batch.ids) if self.mean else 1))
        own, whole = self.engine.weights[list(batch.ids)], self._tokens(batch.drawn or batch.ids)
        like = next(iter(self.task.named_parameters().values()))
        return (own / (step.divisor * whole) if whole else torch.zeros_like(own)).to(like)

    def _tokens(self, ids: Sequence[int]) -> float:
        assert self.engine.weights is not None
        return float(self.engine.weights[list(ids)].sum())

    def losses(self, batch: MicroBatch, on_device: Any = None) -> Tensor:
        """The losses [example] of ``loss=`` where it is given, else the scalar of ``training_step``.

        Args:
            batch: the micro-batch.
            on_device: its data, where they have been read already.

        Raises:
            ValueError: ``loss=`` returned another number of losses than there are examples.
        """
        on_device = self.read(batch) if on_device is None else on_device
        put_back(batch.random, self.task.device)
        with self.task.at(batch.index):
            losses = self.task(on_device)
        if self.joint and len(losses) != len(batch.ids):
            raise ValueError(
                f"Expected `loss=` to return {len(batch.ids)} losses for {len(batch.ids)} examples, got {len(losses)}."
            )
        return losses

    def total(self, batch: MicroBatch, step: Step) -> Tensor:
        """The micro-batch's share of the step's loss, which the fit called backward on."""
        losses, share = self.losses(batch), self.share(batch, step)
        if isinstance(share, Tensor):
            part = 1.0 if batch.drawn is None else self._tokens(batch.ids) / (self._tokens(batch.drawn) or 1.0)
            return losses * (part / step.divisor)
        if self.joint:
            return losses.sum() * share
        return losses * (share * (len(batch.ids) if self.mean else 1))

    def gradients(
        self, step: Step, weights: Tensor | None = None, renormalize: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The step's gradients before clipping.

        Args:
            step: the step.
            weights: [train] of the examples' losses; None: all 1.
            renormalize: divide a micro-batch's loss by the sum of its weights in place of its size.

        Returns:
            The gradients by name, absent where the loss does not depend on the parameter; and the buffers that the
            forward passes wrote into.
        """
        total: dict[str, Tensor] = {}
        self.written = {}
        for batch in step.batches:
            found = self._plain(batch, step) if weights is None else self._weighted(batch, step, weights, renormalize)
            for name, gradient in found.items():
                total[name] = total[name] + gradient if name in total else gradient
            self._keep_buffers()
        if not step.batches:  # all examples have weight 0, but momentum and weight decay go on
            used = [name for name in step.moves.options if name not in self.engine.plan.unreached]
            total = {name: torch.zeros_like(p) for name, p in self.task.named_parameters(used).items()}
        return total, self.written

    def rows(self, batch: MicroBatch, as_drawn: bool = True) -> Gradients:
        """Gradients of the examples' own losses in the joint forward pass.

        Args:
            batch: the micro-batch.
            as_drawn: use the random state of the fit in place of each example's own.
        """
        block = ChosenBlock(batch.ids[0], len(batch.ids), self._batch(batch), self._one_of(batch), batch.ids)
        draws: Callable[[], Any] | None = None
        twice = bool(batch.read) and len(set(batch.ids)) < len(batch.ids)  # one id has two augmentations
        if (batch.random and as_drawn) or twice:
            draws = lambda: put_back(batch.random, self.task.device)  # noqa: E731
        with self.task.at(batch.index):
            return self.engine.gradients(block, draws)

    def copy(self) -> "Forward":
        """A copy for other parts of the batches, which does not repeat the checks."""
        other = copy.copy(self)
        other._kept, other._kept_left, other.written = {}, _KEPT_BYTES, {}
        return other

    def read(self, batch: MicroBatch) -> Any:
        """The collated micro-batch on the device."""
        return self.task.to_device(self._batch(batch))

    def check(self, step: Step, separate: bool) -> bool:
        """Looks once at what the losses of a batch are to its examples when the module trains.

        Args:
            step: the module has the weights before it.
            separate: whether the losses of single examples are needed.

        Returns:
            Whether there were forward passes, which may have written into buffers.

        Raises:
            ValueError: the examples change one another's loss and ``loss=`` is not given; ``loss=`` is not the loss of
                the fit.
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
        moved = self.task.named_parameters(step.moves.options)
        with requiring_gradients(self.task.module, list(moved)):
            return gradient_of(self.total(batch, step), moved)

    def _weighted(self, batch: MicroBatch, step: Step, weights: Tensor, renormalize: bool) -> dict[str, Tensor]:
        own = onto(weights[list(batch.ids)], self.task.device)
        factor = example_factors(own, renormalize and self.mean, self.share(batch, step))
        if not self.joint:
            rows = self.rows(batch)
            scaled = rows.scaled(dict.fromkeys(rows.parts, factor))
            return {name: gradient for name, gradient in scaled.total().items() if name in step.moves.options}
        moved = self.task.named_parameters(step.moves.options)
        with requiring_gradients(self.task.module, list(moved)):
            losses = self.losses(batch)
            return gradient_of((losses * factor.to(losses)).sum(), moved)

    def _one_of(self, batch: MicroBatch) -> Callable[[int], Any]:
        """Reads an example, by its id, as a batch of one: as it was read in the fit where that is known."""

        def one(example: int) -> Any:
            put_back(batch.read, _CPU)
            return self.examples.as_read(batch.ids, batch.ids.index(example))

        return one if batch.read else self.examples.one

    def _batch(self, batch: MicroBatch) -> Any:
        key = batch.ids, *batch.read.items()
        kept, versions = self._kept.get(key, (None, None))
        if versions is not None and versions == versions_of(kept):  # no `training_step` wrote into it
            return kept
        if batch.read:
            put_back(batch.read, _CPU)
            found = self.examples.as_read(batch.ids)
        else:
            found = self.examples.some(batch.ids)
        size = bytes_in(found)
        if versions is None and size <= self._kept_left and keepable(found):
            self._kept_left -= size
            self._kept[key] = found, versions_of(found)
        return found

    def _note_buffers(self) -> None:
        if written := self.task.written_parameters():
            raise ValueError(
                f"Expected `training_step` to leave the parameters to the optimizer, got a write into `{written[0]}`, "
                "which no replay of the optimizer's steps follows. Use `TracInCP()`, or an influence function."
            )
        self.written = {name: buffer.detach().clone() for name, buffer in self.task.named_buffers().items()}

    def _keep_buffers(self) -> None:
        """Puts the buffers that the micro-batch wrote into the module, for the next one of the step."""
        self.task.settle()
        buffers = self.task.named_buffers()
        for name, value in self.written.items():
            buffers[name].data = value.clone()
        self.task.moved()

    def _match_loss(self, step: Step) -> None:
        """Finds whether the fit took the mean or the sum of ``loss=``."""
        batch = step.batches[0]
        try:
            own = self.task.of_step()
        except (TypeError, ValueError):  # manual optimization: the mean, which the comparison with checkpoints tests
            return
        with torch.no_grad(), own.at(batch.index):
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
            joint = self.losses(batch)
            one = self._one_of(batch)
            with self.task.at(batch.index):
                singles = [self.task(self.task.to_device(one(example))).reshape(()) for example in batch.ids]
        own, (whole,) = read_numbers([torch.stack(singles), joint])
        refuse_mixing(own, whole, self.mean, self.engine.weights_of(batch.ids))


def example_factors(weights: Tensor, renormalize: bool, share: float | Tensor) -> Tensor:
    """[..., example]: the factors of the examples' losses in a step, given the weights of a micro-batch's examples.

    Args:
        weights: [..., example], 1 as in the fit.
        renormalize: whether they also count in the divisor.
        share: the factors in the fit, one for all or [example].
    """
    if not renormalize:
        return weights * share
    if isinstance(share, Tensor):
        share = share.to(weights)
        total = (weights * share).sum(-1, keepdim=True)
        return weights * share * share.sum() / torch.where(total == 0, torch.ones_like(total), total)
    total = weights.sum(-1, keepdim=True)
    return weights * weights.shape[-1] / torch.where(total == 0, torch.ones_like(total), total) * share
