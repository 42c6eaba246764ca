"""How a batch's loss relates to the losses of its examples: mean or sum, found by probing; anything else is refused."""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_influence.data.examples import Examples
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.task import Task
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.types import clean

WAY_OUT = "Pass `loss=`, a callable (module, batch) -> [batch] of per-sample losses."
_WAY_OUT_IN_TRAINING = "Pass `loss=`, a callable (module, batch) -> [batch] that gives the losses of the joint batch."
_PROBED = 32


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
    NONE = "none"
    """Per-sample losses, given by ``loss=``."""

    def total(self, loss: Tensor, examples: int) -> Tensor:
        """The sum of the per-sample losses, computed from the loss that the step or ``loss=`` returned.

        Raises:
            ValueError: ``loss=`` did not return one loss per example.
        """
        if self is Reduction.MEAN:
            return loss * examples
        if self is Reduction.NONE and loss.numel() != examples:
            got = loss.numel()
            raise ValueError(
                f"Expected `loss=` to return {examples} losses for {examples} examples, got {got}. Do not reduce over "
                "the batch inside it."
            )
        return loss.sum()

    def coefficient(self) -> Literal["mean", "sum"]:
        """Whether a training step averages (``"mean"``) or sums (``"sum"``) the losses of its batch."""
        return "sum" if self is Reduction.SUM else "mean"


def probe(task: Task, examples: Examples, seed: int) -> Reduction:
    """Find the reduction by comparing losses of batches of 1, 2 and up to 32 examples, evenly spread over the dataset.

    Raises:
        ValueError: no probed loss is finite; the loss is neither the mean nor the sum over examples; or it is a mean
            with class weights, which depends on the other examples of a batch (and hides the weight in a batch of one).
    """
    if task.loss is not None:
        return Reduction.NONE
    probed = evenly_spread(len(examples), _PROBED)
    watch = _LossWatch()
    with watch:  # with gradients enabled: a step may differentiate with respect to its inputs
        losses = {i: _loss(task, examples.one(i), seed, i) for i in probed}
        ids = [i for i, loss in losses.items() if math.isfinite(loss)]  # the scores report all others
        if not ids:
            raise ValueError(
                f"Expected finite losses, got NaN or infinity for all probed training examples, {probed[:10]} among "
                "them. Check the data and the weights for NaN."
            )
        singles = [losses[i] for i in ids]
        batches = {size: _loss(task, examples.some(ids[:size]), seed, ids[0]) for size in {min(2, len(ids)), len(ids)}}
    watch.refuse()
    if len(ids) == 1:
        return Reduction.MEAN
    found = [r for r in (Reduction.MEAN, Reduction.SUM) if all(_agrees(r, singles[:n], x) for n, x in batches.items())]
    if not found:
        raise _refusal(singles, batches)
    return found[0]


def _loss(task: Task, batch: Any, seed: int, example: int) -> float:
    batch = task.to_device(batch)
    seed_for(seed, example)
    try:
        return float(task(batch).detach().double().sum())
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "Expected the loss of a batch to be the mean or the sum of the losses of its examples, got a normalisation "
            f"layer that uses batch statistics in eval mode: {error}. {WAY_OUT}"
        ) from error


def match_loss(losses: Tensor, value: float) -> bool:
    """Whether ``training_step`` returns the mean (True) or the sum (False) of the losses of ``loss=``.

    Args:
        losses: [example]: the losses of ``loss=`` for a batch.
        value: the loss of ``training_step`` for it.

    Raises:
        ValueError: it returns neither.
    """
    singles = losses.double().tolist()
    for reduction in (Reduction.MEAN, Reduction.SUM):
        if _agrees(reduction, singles, value):
            return reduction is Reduction.MEAN
    raise ValueError(
        f"Expected the mean or the sum of `loss=` to be what `training_step` returns, got mean "
        f"{sum(singles) / len(singles):.6g} and sum {sum(singles):.6g} for {value:.6g}. Let `loss=` return each "
        "example's share of the loss that is trained on."
    )


def refuse_mixing(singles: Sequence[float], batch: float, mean: bool) -> None:
    """Raise if the loss of a batch in training mode is not the mean or sum of the losses of its examples.

    Args:
        singles: the loss of each example alone.
        batch: their loss as one batch.
        mean: whether a batch's loss is the mean over its examples; otherwise the sum.

    Raises:
        ValueError: examples of a batch change each other's losses.
    """
    reduction = Reduction.MEAN if mean else Reduction.SUM
    if not _agrees(reduction, singles, batch, 1e-3):
        raise ValueError(
            f"Expected the loss of a batch in training to be the {reduction.value} of the losses of its examples, got "
            f"{batch:.6g} for examples that give {_reduced(reduction, singles):.6g} alone. {_WAY_OUT_IN_TRAINING}"
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


def _reduced(reduction: Reduction, singles: Sequence[float]) -> float:
    return sum(singles) / (len(singles) if reduction is Reduction.MEAN else 1)


def _agrees(reduction: Reduction, singles: Sequence[float], batch: float, tolerance: float = 1e-4) -> bool:
    scale = max(abs(batch), max(abs(x) for x in singles) / len(singles), 1e-30)
    return abs(_reduced(reduction, singles) - batch) <= tolerance * scale


def _refusal(singles: Sequence[float], batches: Mapping[int, float]) -> NoRelation:
    size, loss = max(batches.items())
    mean, total = sum(singles) / len(singles), sum(singles)
    return NoRelation(
        f"Expected the loss of a batch to be the mean or the sum of the losses of its examples, got {loss:.6g} for "
        f"{size} examples whose own losses have mean {mean:.6g} and sum {total:.6g}.",
        "A loss that mixes examples (contrastive, batch statistics), averages over the tokens or pixels of the whole "
        f"batch, or draws random numbers in eval mode cannot be split into losses of its examples. {WAY_OUT}",
    )


class _LossWatch(TorchFunctionMode):
    """Detects class weights with ``reduction="mean"``, with which the weight of an example depends on its batch."""

    def __init__(self) -> None:
        super().__init__()
        self._weighted = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.nll_loss):
            weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
            if weight is not None and kwargs.get("reduction", "mean") == "mean":
                self._weighted |= bool((weight != weight[0]).any())
        return func(*args, **kwargs)

    def refuse(self) -> None:
        """Raise ValueError if there were class weights."""
        if self._weighted:
            raise ValueError(
                "Expected every example to have the same weight in the loss, got class weights with reduction='mean', "
                f"which divides by the weights of all examples in the batch. {WAY_OUT}"
            )
