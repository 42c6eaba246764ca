"""Per-sample gradients for a Fisher matrix: with the labels of the data, or with labels sampled from the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.data.examples import Block
from lightning_influence.devices import cumulated, wide
from lightning_influence.gradients import Engine, Gradients, Reduction
from lightning_influence.gradients.final_layer import Head, find_head
from lightning_influence.gradients.guard import Again
from lightning_influence.numerics.heads import Link
from lightning_influence.setting.setting import Setting, cached

# Gradients of a pass over the training data that take at most this many bytes are kept for the next pass.
KEPT_BYTES = 2**28


@dataclass
class FisherSamples:
    """An iterable over blocks of gradients whose outer products, summed and divided by n, are a Fisher matrix.

    Each of several processes sees its share of the training examples: what it sums must be summed over all of them.

    Where a batch's loss is a mean over tokens, each example counts with its weight.

    Args:
        setting: holds the engine and the training examples.
        labels: ``"empirical"``, ``"sampled"`` or ``"exact"``; see ``EKFAC``.
        seed: of the sampled labels.

    Raises:
        ValueError: the model has no linear layer whose outputs labels can be sampled from.
    """

    setting: Setting
    labels: str
    seed: int
    _kept: list[Gradients] | None = None

    def __post_init__(self) -> None:
        self._loss: SampledLabelLoss | None = None
        if self.labels != "empirical":
            self._loss = SampledLabelLoss(*head_of(self.setting), self.seed, self.setting.n_train)

    @property
    def classes(self) -> int:
        """The number of outputs that labels are sampled from; 0 with the labels of the data."""
        return 0 if self._loss is None else self._loss.classes

    @property
    def draws(self) -> int:
        """How many gradients there are of each example."""
        return self.classes if self.labels == "exact" else 1

    def __iter__(self) -> Iterator[Gradients]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Gradients] | None = []
        size = 0
        for gradients in self.computed():
            if kept is not None:
                size += sum(part.stored_bytes() for part in gradients.parts.values())
                kept = [*kept, gradients] if size <= KEPT_BYTES else None
            yield gradients
        self._kept = kept

    def computed(self) -> Iterator[Gradients]:
        """The blocks, computed now."""
        engine, loss, share = self.setting.engine, self._loss, self.setting.processes.share(self.setting.n_train)
        blocks, chosen = self.setting.examples.blocks(share.start, share.stop), self.setting.examples.chosen
        if loss is None:
            for block in blocks:
                yield self._weighted(engine.gradients(block, again=chosen), block)
            engine.read_checks()
            return
        task = engine.task.measuring(loss)
        task.exact = False  # the loss is linear in the logits
        other = Engine(task, Reduction.NONE, engine.groups, engine.plan)
        for block in blocks:
            # For the expectation each class in turn; None: one sampled label per example.
            for label in [None] if self.labels == "sampled" else range(loss.classes):
                again = partial(loss.again, chosen, label)
                yield self._weighted(other.gradients(loss.for_block(block, label), again=again), block)
        other.read_checks()

    def _weighted(self, gradients: Gradients, block: Block) -> Gradients:
        weights = self.setting.engine.weights_of(block.ids)
        return gradients if weights is None else gradients.scaled(dict.fromkeys(gradients.parts, weights.sqrt()))


def head_of(setting: Setting) -> tuple[Head, Link]:
    """The final linear layer and the loss on it, found once for the weights in place.

    Raises:
        ValueError: there is no such layer, or another loss.
    """

    def found() -> tuple[Head, Link]:
        engine = setting.engine
        head = find_head(engine.task, engine.reduction, setting.examples, None, engine.weights)
        return head, head.link(setting.examples)

    kept: dict[int, tuple[Head, Link]] = setting.state("head", dict)  # by version of the weights
    return cached(kept, setting.engine.task.version, found)


class SampledLabelLoss:
    """A per-sample loss, linear in the logits, with the gradients that labels sampled from the model would give.

    It is scaled by the square root of the loss's own scale, so that the second moment of its gradients is the
    Gauss-Newton matrix.

    Args:
        head: the layer whose outputs are the logits.
        link: the loss on them.
        seed: of the labels.
        n_train: the number of training examples, each of which has random numbers of its own whatever its block.
    """

    def __init__(self, head: Head, link: Link, seed: int, n_train: int) -> None:
        self.head, self.link = head, link
        self.classes = head.layer.out_features
        generator = torch.Generator().manual_seed(seed)
        self._normal = torch.randn(n_train, self.classes, generator=generator, dtype=torch.float64)
        self._uniform = torch.rand(n_train, self.classes, generator=generator, dtype=torch.float64)
        self._ids: range = range(0)
        self._label: int | None = None

    def for_block(self, block: Block, label: int | None) -> Block:
        """The same block, after setting which examples and which label the loss will be called for."""
        self._ids, self._label = block.ids, label

        def one(example: int) -> Any:
            self._ids = range(example, example + 1)
            return block.one(example)

        return replace(block, one=one)

    def again(self, chosen: Again, label: int | None, ids: Sequence[int]) -> Block:
        """The block of some examples, read once more; see ``for_block``."""
        return self.for_block(chosen(ids), label)

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """The losses, [batch]."""
        outputs: list[Tensor] = []
        with self.head.layer.register_forward_hook(lambda layer, args, output: outputs.append(output)):
            self.head.task(batch)
        (z,) = outputs
        with torch.no_grad():
            logits = wide(z.detach())
            self._normal, self._uniform = self._normal.to(logits.device), self._uniform.to(logits.device)
            gradient = self._gradient(logits).to(z)
        return (gradient * z).sum(1)

    def _gradient(self, z: Tensor) -> Tensor:
        """[example, class]: the gradient with respect to the logits z, for labels sampled from the model."""
        mean, rows, scale = self.link.mean(z), slice(self._ids.start, self._ids.stop), self.link.scale**0.5
        if self._label is not None:
            return scale * self._expected(mean, self._label)
        if self.link.kind == "identity":
            return scale * self._normal[rows]
        if self.link.kind == "sigmoid":
            return scale * (mean - (self._uniform[rows] < mean).double())
        beyond = self._uniform[rows, :1] > cumulated(mean)
        label = beyond.sum(1).clamp_max(self.classes - 1)
        return scale * (mean - nn.functional.one_hot(label, self.classes).double())

    def _expected(self, mean: Tensor, k: int) -> Tensor:
        """Gradients whose outer products, summed over the classes k, equal the expectation over labels."""
        own = torch.zeros_like(mean[:1])
        own[0, k] = 1.0
        if self.link.kind == "identity":
            return own.expand_as(mean)
        if self.link.kind == "sigmoid":
            return (mean * (1 - mean)).sqrt() * own
        return mean[:, k : k + 1].sqrt() * (mean - own)
