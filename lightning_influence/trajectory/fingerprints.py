"""Fingerprints of batches: a few numbers per tensor and example, by which a batch is recognised in a later process."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_influence.devices import Readings

# Elements of a tensor, or of an example's row of it, that are looked at: all up to this number, else evenly spread.
_ELEMENTS = 2**13
_LEAVES, _DEPTH = 256, 8
_PLAIN = (str, bytes, bool, int, float, type(None))
# Relative differences that other devices and precisions explain, by the coarser of two dtypes.
_TOLERANCE = {"float64": 1e-9, "complex128": 1e-9, "float16": 2e-2, "bfloat16": 5e-2}
_SINGLE = 1e-4


@dataclass(frozen=True)
class LeafSummary:
    """The fingerprint of one tensor, number or string of a batch, or of a list with one of these per example.

    Args:
        path: where it is in the batch.
        dtype: of a tensor; ``"text"`` for what is compared by its checksum.
        shape: of a tensor.
        whole: the norm of its elements and two sums with fixed weights, or a checksum.
        rows: the same for each of a few examples; None where its first dimension is not that of the examples.
    """

    path: str
    dtype: str
    shape: list[int]
    whole: list[float]
    rows: list[list[float]] | None

    @property
    def floating(self) -> bool:
        """Whether its elements are no integers."""
        return self.dtype.startswith(("float", "bfloat", "complex"))


Fingerprint = list[LeafSummary]


def fingerprint(batch: Any, size: int, positions: Sequence[int]) -> Fingerprint:
    """The fingerprint of a batch.

    Args:
        batch: any nesting of containers, dataclasses and other objects.
        size: number of its examples.
        positions: of those whose rows are summarised.
    """
    return fingerprint_later(batch, size, positions, Readings())()


def fingerprint_later(batch: Any, size: int, positions: Sequence[int], readings: Readings) -> Callable[[], Fingerprint]:
    """The same by a function, which reads what is on a device; until then the batch must stay as it is."""
    with torch.no_grad():
        leaves = [(path, _stored(value)) for path, value in islice(_leaves(batch, size, "", set(), 0), _LEAVES)]
        parts = [[_summary_later(part, readings) for part in _elements(v, size, positions)] for _, v in leaves]
    return lambda: [
        _leaf(path, value, size, positions, [read() for read in reads])
        for (path, value), reads in zip(leaves, parts, strict=True)
    ]


def splits(found: Fingerprint) -> bool:
    """Whether every tensor of the batch has the examples as its first dimension."""
    return any(leaf.rows is not None for leaf in found) and all(
        leaf.rows is not None or not leaf.shape for leaf in found
    )


def difference(
    recorded: Fingerprint, now: Fingerprint, rows: bool, text: bool = True, least: float = 0.0
) -> str | None:
    """What differs first between two fingerprints, in words; None: nothing but rounding.

    Args:
        recorded: during the fit.
        now: of the batch made again.
        rows: compare the rows of single examples, from batches of other sizes; otherwise whole batches.
        text: compare strings too, which may be names of files that differ from one machine to the next.
        least: relative difference of real numbers that is rounding in any case.
    """
    mine, theirs = {leaf.path: leaf for leaf in now}, {leaf.path: leaf for leaf in recorded}
    if mine.keys() != theirs.keys():
        return f"the batch has the parts {_paths(mine)} here, {_paths(theirs)} in the fit"
    for path, leaf in theirs.items():
        if not text and leaf.dtype == mine[path].dtype == "text":
            continue
        if (found := _difference(leaf, mine[path], rows, least)) is not None:
            return f"{f'`batch{path}`' if path else 'the batch'} {found}"
    return None


def _difference(then: LeafSummary, now: LeafSummary, rows: bool, least: float) -> str | None:
    if (then.dtype == "text") != (now.dtype == "text") or then.floating != now.floating:
        return f"is {now.dtype} here, {then.dtype} in the fit"
    if rows and then.rows is None and now.rows is None:
        return None  # the same for all examples, or a number of the batch
    if (then.rows is None) != (now.rows is None) and rows:
        return "has no row per example in one of both batches"
    if then.shape[int(rows) :] != now.shape[int(rows) :]:
        shapes = [["examples", *leaf.shape[1:]] if rows else leaf.shape for leaf in (now, then)]
        return f"has shape [{', '.join(map(str, shapes[0]))}] here, [{', '.join(map(str, shapes[1]))}] in the fit"
    pairs = zip(then.rows or (), now.rows or (), strict=True) if rows else [(then.whole, now.whole)]
    tolerance = max(_tolerance(then, now), least if then.floating else 0.0)
    for a, b in pairs:
        if not _close(a, b, tolerance):
            if then.dtype == "text":
                return "has other values"
            return f"has other values (norm {b[0]:.6g} here, {a[0]:.6g} in the fit)"
    return None


def with_rows(found: Fingerprint, which: Sequence[int]) -> Fingerprint:
    """The same with some of its rows, by position among them."""
    return [
        leaf if leaf.rows is None else dataclasses.replace(leaf, rows=[leaf.rows[k] for k in which]) for leaf in found
    ]


def same_rows(one: Fingerprint, other: Fingerprint, k: int) -> bool:
    """Whether the only row of the second fingerprint is the k-th of the first, in every part that has rows."""
    mine = {leaf.path: leaf for leaf in other}
    for leaf in one:
        if leaf.rows is None:
            continue
        found = mine.get(leaf.path)
        if found is None or not found.rows or not _close(leaf.rows[k], found.rows[0], _tolerance(leaf, found)):
            return False
    return True


def to_json(found: Fingerprint | None) -> list[dict[str, Any]] | None:
    """As plain lists and dicts."""
    return None if found is None else [dict(vars(leaf)) for leaf in found]


def from_json(entries: Sequence[Mapping[str, Any]] | None) -> Fingerprint | None:
    """From what `to_json` returned."""
    return None if entries is None else [LeafSummary(**entry) for entry in entries]


def _paths(leaves: Mapping[str, LeafSummary]) -> str:
    names = [path or "itself" for path in leaves]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _tolerance(one: LeafSummary, other: LeafSummary) -> float:
    if not one.floating:
        return 1e-12
    return max(_TOLERANCE.get(leaf.dtype, _SINGLE) for leaf in (one, other))


def _close(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    if len(one) == 1:
        return one[0] == other[0]
    scale = max(one[0], other[0])
    return all(abs(a - b) <= tolerance * scale for a, b in zip(one, other, strict=True))


def _leaves(value: Any, size: int, path: str, visited: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a batch with their paths."""
    if isinstance(value, (Tensor, *_PLAIN)):
        yield path, value
    elif id(value) in visited or depth > _DEPTH:
        return
    elif hasattr(value, "__array_interface__") or (hasattr(value, "dtype") and hasattr(value, "tolist")):
        yield path, _as_tensor(value)
    elif isinstance(value, (list, tuple)) and len(value) == size and all(isinstance(x, _PLAIN) for x in value):
        yield path, list(value)
    elif (parts := _parts(value)) is not None:
        for name, part in parts:
            yield from _leaves(part, size, path + name, visited | {id(value)}, depth + 1)
    else:
        yield path, f"a {type(value).__name__}"


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """The parts of a container, a dataclass or another object, by name; None where it is none of these."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", value[key]) for key in sorted(value, key=repr)]
    if isinstance(value, (list, tuple)):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    if hasattr(value, "__dict__") and not callable(value):
        return [(f".{name}", vars(value)[name]) for name in sorted(vars(value))]
    return None


def _as_tensor(value: Any) -> Any:
    try:
        return torch.as_tensor(value)
    except (TypeError, RuntimeError, ValueError):
        return repr(value.tolist())


def _stored(value: Any) -> Any:
    """The value; numbers as tensors."""
    of_examples = isinstance(value, list) and all(isinstance(item, (int, float)) for item in value)
    return torch.tensor(value, dtype=torch.float64) if of_examples or isinstance(value, (int, float)) else value


def _elements(value: Any, size: int, positions: Sequence[int]) -> list[Tensor]:
    """Of a tensor: [1, element] of the whole, and [row, element] of each of a few examples, if it has a row of each."""
    if not isinstance(value, Tensor):
        return []
    dense = _dense(value.detach())
    found = [_few(dense.reshape(1, -1))]
    if dense.ndim and not value.is_nested and dense.shape == value.shape and len(dense) == size:
        chosen = dense[torch.as_tensor(positions, dtype=torch.int64, device=dense.device)]
        found.append(_few(chosen.reshape(len(positions), -1)))
    return found


def _few(rows: Tensor) -> Tensor:
    """[row, element]: some of the elements, evenly spread."""
    rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
    count = rows.shape[1]
    return rows if count <= _ELEMENTS else rows[:, torch.arange(_ELEMENTS, device=rows.device) * count // _ELEMENTS]


def _leaf(
    path: str, value: object, size: int, positions: Sequence[int], summaries: Sequence[list[list[float]]]
) -> LeafSummary:
    if isinstance(value, list):  # one plain value per example
        return LeafSummary(path, "text", [size], _checksum(value), [_checksum(value[p]) for p in positions])
    if not isinstance(value, Tensor):
        return LeafSummary(path, "text", [], _checksum(value), None)
    (whole,), *rows = summaries
    dtype = str(value.dtype).removeprefix("torch.")
    return LeafSummary(path, dtype, list(_shape(value)), whole, rows[0] if rows else None)


def _shape(value: Tensor) -> tuple[int, ...]:
    """The sizes of a tensor, of a nested one all but those that differ among its parts."""
    return (value.size(0), *value[0].shape[1:]) if value.is_nested and value.size(0) else tuple(value.shape)


def _dense(value: Tensor) -> Tensor:
    """The stored elements of a sparse, nested or quantised tensor; any other as it is."""
    if value.is_quantized:
        return value.dequantize()
    if value.layout is torch.strided and not value.is_nested:
        return value
    value = value if value.is_nested else value.cpu()  # a device may lack the operations, and float64
    if value.layout is torch.sparse_coo:
        value = value.coalesce()
        return torch.cat([value.indices().reshape(-1).double(), value.values().reshape(-1).double()])
    if value.is_nested:
        return torch.cat([part.reshape(-1) for part in value.unbind()])
    return value.values().reshape(-1)


def _checksum(value: Any) -> list[float]:
    return [float(zlib.crc32(repr(value).encode()))]


def _summary_later(rows: Tensor, readings: Readings) -> Callable[[], list[list[float]]]:
    if rows.is_cpu:
        known = _summary(rows)
        return lambda: known
    arrives = readings.arriving(rows)
    return lambda: _summary(arrives())


def _summary(rows: Tensor) -> list[list[float]]:
    """[row, element] to [row][3]: norm and two sums with fixed weights, which an exchange of elements changes."""
    rows = rows.double().nan_to_num(nan=-7.25, posinf=1e4, neginf=-1e4)
    norms = rows.square().sum(1).sqrt()
    return torch.cat([norms[:, None], rows @ _weights(rows.shape[1])], 1).tolist()


@functools.lru_cache(16)
def _weights(count: int) -> Tensor:
    """[element, 2] between -1 and 1, without any two alike nearby; nothing is drawn."""
    numbers = torch.arange(1, count + 1, dtype=torch.float64)
    steps = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1
    return torch.stack([2 * (numbers * step).frac() - 1 for step in steps], 1)
