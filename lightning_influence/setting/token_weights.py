"""How a module's loss of a batch weighs its examples, found once and again where an odd example shows that it must."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.data.examples import Examples
from lightning_influence.gradients import Reduction, probe_examples
from lightning_influence.gradients.precise import CANNOT, precise
from lightning_influence.gradients.reduction_probe import Probed
from lightning_influence.gradients.sample import Sample
from lightning_influence.module.task import Task


@dataclass
class TokenWeights:
    """What was found about the reduction of a loss, and the weights of the examples of each dataset.

    Args:
        probed: how the loss of a batch follows from its examples' losses; None: not known yet.
        again: whether it was found with the examples of a batch in which one was odd.
    """

    probed: Probed | None = None
    again: bool = False
    _weights: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)

    def of(self, task: Task, examples: Examples, reduction: Reduction) -> Tensor | None:
        """[example]: the weights of a dataset's examples in a mean over tokens; None for other reductions."""
        if reduction is not Reduction.TOKENS or self.probed is None or self.probed.counter is None:
            return None
        key = id(examples.dataset)
        if key not in self._weights:  # as long as the dataset is kept, no other object has its id
            self._weights[key] = examples.dataset, self.probed.counter.weights(task, examples)
        return self._weights[key][1]

    def find_again(self, task: Task, examples: Examples, names: Sequence[str], block: Sequence[int]) -> bool:
        """Probe once more with some examples of a batch; whether the loss turns out to be a mean over tokens."""
        probed = None
        with contextlib.suppress(ValueError):  # the error that led here names the example
            probed, _ = probe(task, examples, names, block)
        if probed is None or probed.reduction is not Reduction.TOKENS:
            return False
        self.probed, self.again = probed, True
        self._weights.clear()
        return True


def probe(task: Task, examples: Examples, names: Sequence[str], also: Sequence[int] = ()) -> tuple[Probed, Sample]:
    """See ``probe_examples``; in float64 where float32 shows nothing, in which losses near 0 have few digits."""
    try:
        return probe_examples(task, examples, names, also)
    except ValueError:
        if all(p.dtype is torch.float64 for p in task.named_parameters().values()):
            raise
        with contextlib.suppress(*CANNOT), precise(task, torch.float64) as other:
            return probe_examples(other, examples, names, also)
        raise


def describe(weights: Tensor) -> str:
    """What a reader of scores should know of the examples' weights."""
    text = (
        "The loss of a batch is a mean over its tokens, pixels, labels or class weights: each example weighs by its "
        "share of them"
    )
    without = (weights == 0).nonzero()[:, 0].tolist()
    if not without:
        return text
    return f"{text}; training examples without any have no influence: {without[:5]}{' and more' * (len(without) > 5)}"
