"""Finds how a batch's loss relates to its examples', by the passes of a sample."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_influence.gradients.reduction import WAY_OUT, NoRelation, Reduction
from lightning_influence.gradients.sample import Sample
from lightning_influence.gradients.token_counts import Key, TokenCounter, has_none
from lightning_influence.gradients.token_probe import GradientProbe

# Of losses, in a module that runs in 16 bits only.
_OF_16_BITS = 2e-2


@dataclass(frozen=True)
class Probed:
    """What ``probe`` found.

    Args:
        reduction: how the loss of a batch follows from the losses of its examples.
        counter: counts the examples' tokens, with ``Reduction.TOKENS``.
    """

    reduction: Reduction
    counter: TokenCounter | None = None


def probe(sample: Sample, also: Sequence[int] = ()) -> Probed:
    """Find the reduction by comparing losses of batches with those of their examples.

    Where the forward pass counts something that examples have unequally many of (tokens that are not masked, class
    weights), the gradients of a few batches are compared as well.

    Args:
        sample: of the dataset.
        also: examples to compare besides.

    Raises:
        ValueError: no probed loss is finite; the loss is neither the mean nor the sum over examples, nor the mean over
            something that was counted.
    """
    if sample.task.loss is not None:
        return Probed(Reduction.NONE)
    probed = list(dict.fromkeys([*also, *sample.ids]))
    sample.prepare_losses(_batches(sample, probed, bool(also)))
    losses, totals, declared = _singles(sample, probed)
    ids = [i for i, loss in losses.items() if math.isfinite(loss)]  # the scores report all others
    if not ids:
        if len(probed) > 1 and math.isfinite(sample.losses([probed])[tuple(probed)]):
            raise NoRelation(
                "Expected the loss of a batch to be the mean or the sum of the losses of its examples, got a finite "
                "loss for a batch, and NaN or infinity for each of its examples alone.",
                f"It compares examples with each other (pairs, halves of the batch, a variance). {WAY_OUT}",
            )
        raise ValueError(
            f"Expected finite losses, got NaN or infinity for all probed training examples, {probed[:10]} among "
            "them. Check the data and the weights for NaN."
        )
    batches = sample.losses(_batches(sample, ids, bool(also)))
    if len(ids) == 1:
        return Probed(Reduction.MEAN)
    tolerance = 1e-4 if sample.task.tolerance is None else _OF_16_BITS
    found = _plain_relations(losses, batches, tolerance)
    if not found:
        batches = sample.losses(batches, plain=True)
        found = _plain_relations(losses, batches, tolerance)
    gradients = sample.with_gradients
    if found == [Reduction.SUM] or (found and not (declared or (gradients and _unequal(totals)))):
        return Probed(found[0])
    mean_over = GradientProbe(sample, ids, totals)
    if found and not declared and mean_over.holds(dict.fromkeys(ids, 1.0)):
        return Probed(Reduction.MEAN)
    counter = mean_over.counter([*declared, *_unequal(totals)])
    if counter is not None:
        return Probed(Reduction.TOKENS, counter)
    if found and mean_over.holds(dict.fromkeys(ids, 1.0), roughly=True):  # such as a metric in float32
        return Probed(Reduction.MEAN)
    raise _refusal(losses, batches)


_Totals = dict[Key, dict[int, float]]


def _batches(sample: Sample, ids: Sequence[int], several: bool) -> list[tuple[int, ...]]:
    """The batches whose losses are compared: those of the sample and one with its odd examples, or 2 and all of them.

    Args:
        sample: with or without gradients.
        ids: the examples with finite losses.
        several: whether the examples of a batch in which one is odd are among them.
    """
    of_sample = [tuple(batch) for batch in sample.chosen if set(batch) <= set(ids)]
    if several or not sample.with_gradients or len(of_sample) < len(sample.chosen):
        return list(dict.fromkeys([tuple(ids[:2]), tuple(ids)]))
    odd = [i for i in sample.odd if i in ids]
    if any(set(odd) <= set(batch) for batch in of_sample):
        return of_sample
    mixed = list(dict.fromkeys([*odd, *ids]))[: 2 * len(odd)]
    return [*of_sample, *([tuple(mixed)] if len(mixed) > 1 else [])]


def _singles(sample: Sample, probed: Sequence[int]) -> tuple[dict[int, float], _Totals, list[Key]]:
    """Losses of single examples, what was counted in each, and which counts are of unequal class weights."""
    losses, totals, declared = {}, _Totals(), dict[Key, None]()
    for i, one in {i: sample.alone(i) for i in probed}.items():  # all passes before the first of them is read
        losses[i] = one.loss
        declared |= dict.fromkeys(one.class_weights)
        for key, total in one.counts.items():  # of two copies of an example twice as many: only ratios count
            none = has_none(key, total, one.loss, sample.task, sample.examples, i)
            totals.setdefault(key, {})[i] = 0.0 if none else total
    for of in totals.values():  # without a loss, an example may pass by what counts
        of |= {i: 0.0 for i, loss in losses.items() if loss == 0 and i not in of}
    finite = [i for i, loss in losses.items() if math.isfinite(loss)]
    return losses, {key: of for key, of in totals.items() if of.keys() >= set(finite)}, list(declared)


def _plain_relations(
    losses: Mapping[int, float], batches: Mapping[tuple[int, ...], float], tolerance: float
) -> list[Reduction]:
    """Which of mean and sum the losses of all batches are."""
    pairs = [([losses[i] for i in batch], loss) for batch, loss in batches.items()]
    return [r for r in (Reduction.MEAN, Reduction.SUM) if all(r.agrees(*pair, tolerance) for pair in pairs)]


def _unequal(totals: _Totals) -> list[Key]:
    """The operations that counted unequally much in the examples; cross-entropy first, then the last in the step."""
    ranges = {key: (min(of.values()), max(of.values())) for key, of in totals.items()}
    unequal = [key for key, (least, most) in ranges.items() if least >= 0 and most - least > 1e-9 * most]
    unequal.reverse()
    return sorted(unequal, key=lambda key: key[0] != "cross entropy")


def _refusal(losses: Mapping[int, float], batches: Mapping[tuple[int, ...], float]) -> NoRelation:
    batch = max(batches, key=len)
    singles = [losses[i] for i in batch]
    mean, total = sum(singles) / len(singles), sum(singles)
    return NoRelation(
        "Expected the loss of a batch to be the mean or the sum of the losses of its examples, got "
        f"{batches[batch]:.6g} for {len(batch)} examples whose own losses have mean {mean:.6g} and sum {total:.6g}.",
        "A loss that mixes examples (contrastive, batch statistics), adds up means over different counts (tokens and "
        f"examples), or draws random numbers in eval mode cannot be split into losses of its examples. {WAY_OUT}",
    )
