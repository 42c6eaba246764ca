"""How a batch's loss relates to its examples': mean, sum or mean over tokens, found by probing; others are refused."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_influence.data.examples import Examples
from lightning_influence.gradients.token_counts import CountWatch, Key, TokenCounter
from lightning_influence.gradients.token_probe import GradientProbe
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.task import Task
from lightning_influence.numerics.subsets import evenly_spread
from lightning_influence.types import clean

PASS_LOSS = "Pass `loss=`, a callable (module, batch) -> [batch] of per-sample losses"
WAY_OUT = f"{PASS_LOSS}."
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

    def coefficient(self) -> Literal["mean", "sum"]:
        """Whether a training step averages (``"mean"``) or sums (``"sum"``) the losses of its batch."""
        return "sum" if self is Reduction.SUM else "mean"


@dataclass(frozen=True)
class Probed:
    """What ``probe`` found.

    Args:
        reduction: how the loss of a batch follows from the losses of its examples.
        counter: counts the examples' tokens, with ``Reduction.TOKENS``.
    """

    reduction: Reduction
    counter: TokenCounter | None = None


def probe(task: Task, examples: Examples, seed: int, also: Sequence[int] = (), gradients: bool = True) -> Probed:
    """Find the reduction by comparing losses of batches of 1, 2 and up to 32 examples, evenly spread over the dataset.

    Where the forward pass counts something that examples have unequally many of (tokens that are not masked, class
    weights), the gradients of a few batches are compared as well.

    Args:
        task: the module with its loss.
        examples: the dataset.
        seed: of the random state.
        also: examples to compare besides those that are evenly spread.
        gradients: whether gradients may be compared where the losses alone are those of a mean over examples.

    Raises:
        ValueError: no probed loss is finite; the loss is neither the mean nor the sum over examples, nor the mean over
            something that was counted.
    """
    if task.loss is not None:
        return Probed(Reduction.NONE)
    probed = list(dict.fromkeys([*also, *evenly_spread(len(examples), _PROBED)]))
    losses, totals, declared = _singles(task, examples, seed, probed)
    ids = [i for i, loss in losses.items() if math.isfinite(loss)]  # the scores report all others
    if not ids:
        if len(probed) > 1 and math.isfinite(_loss(task, examples.some(probed), seed, probed[0])):
            raise NoRelation(
                "Expected the loss of a batch to be the mean or the sum of the losses of its examples, got a finite "
                "loss for a batch, and NaN or infinity for each of its examples alone.",
                f"It compares examples with each other (pairs, halves of the batch, a variance). {WAY_OUT}",
            )
        raise ValueError(
            f"Expected finite losses, got NaN or infinity for all probed training examples, {probed[:10]} among "
            "them. Check the data and the weights for NaN."
        )
    singles = [losses[i] for i in ids]
    batches = {size: _loss(task, examples.some(ids[:size]), seed, ids[0]) for size in {min(2, len(ids)), len(ids)}}
    if len(ids) == 1:
        return Probed(Reduction.MEAN)
    found = [r for r in (Reduction.MEAN, Reduction.SUM) if all(_agrees(r, singles[:n], x) for n, x in batches.items())]
    if found == [Reduction.SUM] or (found and not (declared or (gradients and _unequal(totals)))):
        return Probed(found[0])
    mean_over = GradientProbe(task, examples, seed, ids, totals)
    if found and not declared and mean_over.holds(dict.fromkeys(ids, 1.0)):
        return Probed(Reduction.MEAN)
    counter = mean_over.counter([*declared, *_unequal(totals)])
    if counter is not None:
        return Probed(Reduction.TOKENS, counter)
    if found and mean_over.holds(dict.fromkeys(ids, 1.0), roughly=True):  # such as a metric in float32
        return Probed(Reduction.MEAN)
    raise _refusal(singles, batches)


_Totals = dict[Key, dict[int, float]]


def _singles(
    task: Task, examples: Examples, seed: int, probed: Sequence[int]
) -> tuple[dict[int, float], _Totals, list[Key]]:
    """Losses of single examples, what was counted in each, and which counts are of unequal class weights."""
    losses, totals, declared = {}, _Totals(), dict[Key, None]()
    for i in probed:
        watch = CountWatch()
        losses[i] = _loss(task, examples.one(i), seed, i, watch)
        declared |= dict.fromkeys(watch.class_weights)
        for key, total in watch.totals().items():  # of two copies of an example twice as many: only ratios count
            totals.setdefault(key, {})[i] = total
    finite = [i for i, loss in losses.items() if math.isfinite(loss)]
    return losses, {key: of for key, of in totals.items() if of.keys() >= set(finite)}, list(declared)


def _unequal(totals: _Totals) -> list[Key]:
    """The operations that counted unequally much in the examples; cross-entropy first, then the last in the step."""
    ranges = {key: (min(of.values()), max(of.values())) for key, of in totals.items()}
    unequal = [key for key, (least, most) in ranges.items() if least >= 0 and most - least > 1e-9 * most]
    unequal.reverse()
    return sorted(unequal, key=lambda key: key[0] != "cross entropy")


def _loss(task: Task, batch: Any, seed: int, example: int, watch: CountWatch | None = None) -> float:
    batch = task.to_device(batch)
    seed_for(seed, example)
    try:
        with watch or contextlib.nullcontext():  # neither how the batch is made nor the sum below is the step's
            loss = task(batch)  # with gradients enabled: a step may differentiate with respect to its inputs
        return float(loss.detach().double().sum())
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
        "A loss that mixes examples (contrastive, batch statistics), adds up means over different counts (tokens and "
        f"examples), or draws random numbers in eval mode cannot be split into losses of its examples. {WAY_OUT}",
    )
