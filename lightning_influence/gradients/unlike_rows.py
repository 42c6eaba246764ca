"""Finds the examples of a batch that are most unlike the others, by their labels, masks, lengths and NaN."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_influence.data.examples import Block
from lightning_influence.module.copies import Copies

# Floats beyond this many per example are summed only, which finds NaN and empty examples.
_COUNTED = 256
# Of labels that few examples of the first block have, this many are looked at.
_RARE = 4
# Of the numbers of a first block at least this large, only the rare ones are looked at.
_LARGE = 64
# With more numbers than this, they are no classes.
_CLASSES = 1024
_DEPTH = 4
_NUMBER = "number"
_LARGEST, _SMALLEST = "largest", "smallest"
_LABELLED = "labelled"

# By how much less it tells that an example has an extreme number than an extreme count.
_SURPRISE = {_NUMBER: 4, _LARGEST: 8, _SMALLEST: 8}

Feature = tuple[str, str, int]
"""Where in the batch, what is counted there, and out of how many."""


@dataclass
class _Range:
    """The smallest and the largest value of a feature so far, the examples that have them, and the sum of all."""

    low: float
    high: float
    low_id: int
    high_id: int
    total: float = 0.0
    count: int = 0


@dataclass
class UnlikeRows:
    """Follows a pass over a dataset and names the examples whose counts and numbers were not met before.

    It reads batches before their transfer to the device.

    Args:
        closely: whether the largest and the smallest of several numbers count as well.
    """

    closely: bool = False
    _ranges: dict[Feature, _Range] = field(default_factory=dict)
    _numbers: dict[str, dict[float, int]] = field(default_factory=dict)
    _seen: bytearray = field(default_factory=bytearray)
    _spent: dict[str, int] = field(default_factory=dict)
    _followed: int = 0

    def again(self) -> "UnlikeRows":
        """For another pass over the dataset, in which nothing but what is beyond the first one's counts is new."""
        # Copies: where that pass is interrupted, what it named may not have been looked at.
        known = copy.deepcopy((self._ranges, self._numbers))
        return UnlikeRows(self.closely, *known, _spent=self._spent, _followed=self._followed)

    def new(self, block: Block) -> dict[int, int] | None:
        """The rows to look at, each with the id of an example that it is unlike; None if all were seen before."""
        if not self._add(block.ids):
            return None
        found: dict[int, int] = {}
        early = self._followed < _LARGE <= block.size
        self._followed += block.size
        features = dict(_features(block.batch, block.size, self.closely))
        if not features:
            return found
        table = torch.stack(list(features.values()))
        lows, highs = table.min(1), table.max(1)
        found_of = (lows.values, highs.values, lows.indices, highs.indices, table.sum(1))
        extremes = zip(*(x.tolist() for x in found_of), strict=True)
        for feature, (low, high, at_low, at_high, total) in zip(features, extremes, strict=True):
            first = feature not in self._ranges
            known = self._ranges.setdefault(feature, _Range(low, low, block.ids[at_low], block.ids[at_low]))
            known.total, known.count = known.total + total, known.count + block.size
            if high > known.high:
                known.high, known.high_id = high, block.ids[at_high]
                if self._counts(feature, early):
                    found[at_high] = known.low_id
            if low < known.low or (first and low < high):
                known.low, known.low_id = low, block.ids[at_low]
                if self._counts(feature, early):
                    found[at_low] = known.high_id
        for (where, kind, _), values in features.items():
            if kind == _NUMBER:
                found |= self._new_numbers(where, values, block, early)
        return found

    def extremes(self, block: Block) -> set[int]:
        """The rows of a block with the smallest and the largest of each count."""
        found: set[int] = set()
        for _, values in _features(block.batch, block.size):
            if bool((values != values[0]).any()):
                found |= {int(values.argmin()), int(values.argmax())}
        return found

    def other(self, example: int) -> int | None:
        """An example that differs from this one in most of what is counted; None if there is none."""
        for known in self._ranges.values():
            if known.low < known.high:
                return known.low_id if example != known.low_id else known.high_id
        return None

    def describe(self, block: Block, row: int) -> str:
        """What is unusual about an example, such as "`batch[1]` has 2 of 10 labels"; empty if nothing is."""
        best, text = 0.0, ""
        for (where, kind, out_of), values in _features(block.batch, block.size, self.closely):
            if kind == _LABELLED:  # the number says more
                continue
            own = _Range(float(values.min()), float(values.max()), 0, 0, float(values.sum()), block.size)
            known = self._ranges.get((where, kind, out_of), own)
            value, low, high = float(values[row]), min(own.low, known.low), max(own.high, known.high)
            usual = (own.total + known.total) / (own.count + known.count)
            unlike = abs(value - usual) / (high - low) / _SURPRISE.get(kind, 1) if high > low else 0.0
            if unlike > best:
                best = unlike
                text = _described(where, kind, value, out_of)
        return text

    def _add(self, ids: Sequence[int]) -> bool:
        """Note the examples as seen; whether one of them is new."""
        if isinstance(ids, range):
            if ids.stop <= len(self._seen) and self._seen.find(0, ids.start, ids.stop) < 0:
                return False
            self._seen.extend(bytes(max(0, ids.stop - len(self._seen))))
            self._seen[ids.start : ids.stop] = b"\x01" * len(ids)
            return True
        self._seen.extend(bytes(max(0, max(ids) + 1 - len(self._seen))))
        new = [i for i in ids if not self._seen[i]]
        for i in new:
            self._seen[i] = 1
        return bool(new)

    def _new_numbers(self, where: str, values: Tensor, block: Block, early: bool) -> dict[int, int]:
        """Rows with whole numbers, such as classes, that no earlier block had; of the first block, the rare ones."""
        first = early or where not in self._numbers
        known = self._numbers.setdefault(where, {})
        if len(known) > _CLASSES:
            return {}
        numbers, counts = values.unique(return_counts=True)
        if bool((numbers != numbers.round()).any()):
            return {}
        found: dict[int, int] = {}
        ends = float(numbers[0]), float(numbers[-1])
        rarest_first = sorted(zip(counts.tolist(), numbers.tolist(), strict=True))
        usual = next(iter(known.values())) if known else block.ids[int((values == rarest_first[-1][1]).nonzero()[0, 0])]
        for count, number in rarest_first:
            if number in known:
                continue
            row = int((values == number).nonzero()[0, 0])
            rare = count <= block.size // _LARGE and (len(numbers) <= block.size // 8 or number in ends)
            if (rare or not first) and self._affordable(where) and len(found) < _RARE:
                found[row] = usual
            known[number] = block.ids[row]
        return found

    def _counts(self, feature: Feature, early: bool) -> bool:
        """Whether an extreme of a feature is looked at; in a large first block, the rare numbers are instead."""
        if feature[1] in (_LARGEST, _SMALLEST):
            return early or self._affordable(feature[0])
        return feature[1] != _NUMBER or (not early and self._affordable(feature[0]))

    def _affordable(self, where: str) -> bool:
        """Whether another example may be looked at for a number alone, of which ids or times bring many."""
        self._spent[where] = self._spent.get(where, 0) + 1
        return self._spent[where] <= 16 + len(self._seen) // 64


_NOUNS = {
    "true": "true entries",
    "labels": "labels that are not negative",
    "nonzero": "entries other than 0",
    "same": "entries equal to its last one",
    "255": "entries of 255",
    "nan": "NaN",
    "length": "entries",
}


def _described(where: str, kind: str, value: float, out_of: int) -> str:
    if kind == _NUMBER:
        return f"`{where}` is {value:g}"
    if kind in (_LARGEST, _SMALLEST):
        return f"the {kind} entry of `{where}` is {value:g}"
    return f"`{where}` has {value:g}{f' of {out_of}' if out_of else ''} {_NOUNS[kind]}"


def _features(batch: Any, size: int, closely: bool = False) -> Iterator[tuple[Feature, Tensor]]:
    """[example] float64 on the CPU: numbers that tell the examples of a batch apart."""
    if isinstance(batch, Copies):
        yield from ((feature, values[:1]) for feature, values in _features(batch.batch, 2, closely))
        return
    for where, leaf in _leaves(batch, "batch", size, 0):
        for kind, out_of, values in _of_leaf(leaf, size):
            yield (where, kind, out_of), values.double().cpu()
        several = isinstance(leaf, Tensor) and leaf.ndim > 1 and len(leaf) == size and leaf.numel() > size
        if closely and several and leaf.is_floating_point() and leaf.layout is torch.strided:
            rows = leaf.detach().reshape(size, -1).nan_to_num(0.0, 0.0, 0.0)
            yield (where, _LARGEST, 0), rows.amax(1).double().cpu()
            yield (where, _SMALLEST, 0), rows.amin(1).double().cpu()


def _leaves(value: Any, where: str, size: int, depth: int) -> Iterator[tuple[str, Any]]:
    """The tensors of a batch, and its lists with one tensor per example, with where they are."""
    if isinstance(value, (Tensor, PackedSequence)):
        yield where, value
    elif depth > _DEPTH or isinstance(value, str):
        return
    elif isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], f"{where}[{key!r}]", size, depth + 1)
    elif isinstance(value, (list, tuple)):
        if len(value) == size and depth:
            yield where, [_length(x) for x in value]
        for i, part in enumerate(value[:16]):
            yield from _leaves(part, f"{where}[{i}]", size, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for key, part in vars(value).items():
            yield from _leaves(part, f"{where}.{key}", size, depth + 1)


def _length(value: Any) -> int:
    """The number of entries in an example's part of a list."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, Mapping):
        return sum(_length(part) for part in value.values())
    return len(value) if isinstance(value, (list, tuple, str)) else 0


def _of_leaf(leaf: Any, size: int) -> Iterator[tuple[str, int, Tensor]]:
    """What is counted, out of how many, and the counts [example]."""
    if isinstance(leaf, list):
        yield "length", 0, torch.tensor(leaf)
    elif isinstance(leaf, PackedSequence):
        lengths = (leaf.batch_sizes[None] > torch.arange(size)[:, None]).sum(1)
        yield "length", 0, lengths if leaf.unsorted_indices is None else lengths[leaf.unsorted_indices.cpu()]
    elif leaf.layout is not torch.strided:
        yield from _of_sparse(leaf, size)
    elif leaf.ndim and not leaf.is_complex() and leaf.numel():
        if len(leaf) == size:
            yield from _of_rows(leaf, size)
        elif leaf.ndim == 1 and not leaf.is_floating_point() and leaf.dtype is not torch.bool:
            yield from _of_owners(leaf, size)


def _of_sparse(leaf: Tensor, size: int) -> Iterator[tuple[str, int, Tensor]]:
    if leaf.shape[0] == size and leaf.layout is torch.sparse_coo:
        yield "nonzero", 0, leaf._indices()[0].bincount(minlength=size)
    elif leaf.shape[0] == size and leaf.layout is torch.sparse_csr:
        yield "nonzero", 0, leaf.crow_indices().diff()


def _of_owners(leaf: Tensor, size: int) -> Iterator[tuple[str, int, Tensor]]:
    """Lengths of examples one behind the other, from where each begins or from the example of each position."""
    if int(leaf[0]) == 0 and bool((leaf.diff() >= 0).all()):
        if len(leaf) == size + 1:
            yield "length", 0, leaf.diff()
        elif int(leaf[-1]) < size:
            yield "length", 0, leaf.bincount(minlength=size)


def _of_rows(leaf: Tensor, size: int) -> Iterator[tuple[str, int, Tensor]]:
    """Counts over the entries of each example."""
    rows = leaf.detach().reshape(size, -1)
    n = rows.shape[1]
    if leaf.dtype is torch.bool:
        yield "true", n, rows.sum(1)
    elif not leaf.is_floating_point():
        if n == 1:
            yield _NUMBER, 1, rows[:, 0]
            yield _LABELLED, 1, rows[:, 0] >= 0
            return
        yield "labels", n, (rows >= 0).sum(1)
        yield "nonzero", n, rows.count_nonzero(1)
        yield "same", n, (rows == rows[:, -1:]).sum(1)
        if int(rows.max()) == 255:
            yield "255", n, (rows == 255).sum(1)
    elif n == 1:
        yield "nan", 1, rows[:, 0].isnan()
        yield _NUMBER, 1, rows[:, 0].nan_to_num(0.0, 0.0, 0.0)
    elif n <= _COUNTED:
        yield "nan", n, rows.isnan().sum(1)
        yield "nonzero", n, rows.count_nonzero(1)
    else:
        total = rows.sum(1)
        yield "nan", n, total.isnan()
        yield "nonzero", n, (total != 0)
