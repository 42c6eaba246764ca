"""How a batch's loss relates to its examples': their mean or sum, or the mean over their tokens; others are refused."""

from collections.abc import Sequence
from enum import Enum
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_influence.devices import wide
from lightning_influence.types import clean

PASS_LOSS = "Pass `loss=`, a callable (module, batch) -> [batch] of per-sample losses"
WAY_OUT = f"{PASS_LOSS}."
_WAY_OUT_IN_TRAINING = "Pass `loss=`, a callable (module, batch) -> [batch] that gives the losses of the joint batch."


class NoRelation(ValueError):
    """The loss of a batch is not made of the losses of its examples.

    Args:
        found: what was expected and what was found.
        why: the possible causes and the way out.
    """

    def __init__(self, found: str, why: str = "") -> None:
        super().__init__(f"{found} {why}".strip())
        self.found = found


class Reduction(Enum):
    """What ``training_step`` returns for a batch."""

    MEAN = "mean"
    SUM = "sum"
    TOKENS = "token mean"
    """The mean over all tokens (pixels, labels, class weights) of the batch; its examples have unequally many."""
    NONE = "none"
    """Per-sample losses, given by ``loss=``."""

    def total(self, loss: Tensor, examples: int, weights: Tensor | None = None) -> Tensor:
        """The sum of the per-sample losses, computed from the loss that the step or ``loss=`` returned.

        Args:
            loss: what was returned for a batch.
            examples: the size of the batch.
            weights: [example], with ``TOKENS``; the losses in the sum are multiplied by them.

        Raises:
            ValueError: ``loss=`` did not return one loss per example.
        """
        if self is Reduction.TOKENS and weights is not None:
            return loss * float(weights.nansum())
        if self in (Reduction.MEAN, Reduction.TOKENS):
            return loss * examples
        if self is Reduction.NONE and loss.numel() != examples:
            got = loss.numel()
            raise ValueError(
                f"Expected `loss=` to return {examples} losses for {examples} examples, got {got}. Do not reduce over "
                "the batch inside it."
            )
        return loss.sum()

    def factor(self, examples: int, weights: Tensor | None = None) -> float:
        """By what ``total`` multiplies the loss of a batch, summed where it is one loss per example."""
        if self is Reduction.TOKENS and weights is not None:
            return float(weights.nansum())
        return float(examples) if self in (Reduction.MEAN, Reduction.TOKENS) else 1.0

    def of(self, singles: Sequence[float]) -> float:
        """The loss of a batch whose examples have these losses: their mean, or with ``SUM`` their sum."""
        return sum(singles) / (1 if self is Reduction.SUM else len(singles))

    def agrees(self, singles: Sequence[float], batch: float, tolerance: float = 1e-4) -> bool:
        """Whether the loss of a batch is that of its examples' losses, up to rounding errors."""
        scale = max(abs(batch), max(abs(x) for x in singles) / len(singles), 1e-30)
        return abs(self.of(singles) - batch) <= tolerance * scale

    def coefficient(self) -> Literal["mean", "sum"]:
        """Whether a training step averages (``"mean"``) or sums (``"sum"``) the losses of its batch."""
        return "sum" if self is Reduction.SUM else "mean"


def match_loss(losses: Tensor, value: float) -> bool:
    """Whether ``training_step`` returns the mean (True) or the sum (False) of the losses of ``loss=``.

    Args:
        losses: [example]: the losses of ``loss=`` for a batch.
        value: the loss of ``training_step`` for it.

    Raises:
        ValueError: it returns neither.
    """
    singles = wide(losses).tolist()
    for reduction in (Reduction.MEAN, Reduction.SUM):
        if reduction.agrees(singles, value):
            return reduction is Reduction.MEAN
    raise ValueError(
        f"Expected the mean or the sum of `loss=` to be what `training_step` returns, got mean "
        f"{sum(singles) / len(singles):.6g} and sum {sum(singles):.6g} for {value:.6g}. Let `loss=` return each "
        "example's share of the loss that is trained on."
    )


def refuse_mixing(singles: Sequence[float], batch: float, mean: bool, weights: Tensor | None = None) -> None:
    """Raise if the loss of a batch in training mode is not the mean or sum of the losses of its examples.

    Args:
        singles: the loss of each example alone.
        batch: their loss as one batch.
        mean: whether a batch's loss is the mean over its examples; otherwise the sum.
        weights: [example]: of the examples in the mean; None: all the same.

    Raises:
        ValueError: examples of a batch change each other's losses.
    """
    reduction = Reduction.MEAN if mean else Reduction.SUM
    if weights is not None and bool(weights.any()):
        share = (weights * len(singles) / weights.sum()).tolist()
        singles = [loss * w if w else 0.0 for loss, w in zip(singles, share, strict=True)]
    if not reduction.agrees(singles, batch, 1e-3):
        raise ValueError(
            f"Expected the loss of a batch in training to be the {reduction.value} of the losses of its examples, got "
            f"{batch:.6g} for examples that give {reduction.of(singles):.6g} alone. {_WAY_OUT_IN_TRAINING}"
        )


def refuse_batch_statistics(module: nn.Module) -> None:
    """Raise if a layer normalises by the statistics of its batch.

    Raises:
        ValueError: there is such a layer; the message names it.
    """
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and part.training:
            raise ValueError(
                f"Expected examples that do not change one another's loss in training, got `{clean(name)}` "
                f"({type(part).__name__}) in train mode, which normalises by its batch. {_WAY_OUT_IN_TRAINING}"
            )
