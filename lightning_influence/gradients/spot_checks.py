"""Spot checks while scoring: an example's gradient in its block, compared with a backward pass of it alone."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.devices import read_numbers, widest
from lightning_influence.gradients.precise import Tolerance
from lightning_influence.gradients.rules.rule import arguments

# Operations that may reorder or drop examples depending on the data.
_REORDERS = frozenset(
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("sort", "argsort", "topk", "nonzero", "index_select", "index_add", "masked_select", "unique")
)


_COUNTS = frozenset(
    getattr(owner, name) for owner in (torch, Tensor) for name in ("sum", "mean", "count_nonzero", "unbind")
)
_SCALES = frozenset(
    [getattr(owner, name) for owner in (torch, Tensor) for name in ("div", "true_divide", "divide", "mul", "multiply")]
    + [Tensor.__truediv__, Tensor.__mul__, Tensor.__rmul__, Tensor.div_, Tensor.mul_]
)
# Of tensors with more entries no copy is made to find the largest.
_SMALL = 2**12
# Differences of about so many entries are formed at once.
_TOGETHER = 2**22
_READS = frozenset({Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__float__})


class UnequalWeight(ValueError):
    """An example does not weigh in its batch as it does alone.

    Args:
        message: what was expected.
        block: the examples of the batch; it may be another of them that weighs more or less than most.
    """

    def __init__(self, message: str, block: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.block = block
        self.suspects: Sequence[int] = ()
        """Those of them that were most unlike the others."""
        self.of_queries = False
        """Whether they are queries."""


class SuspectRows:
    """Watches one forward pass for operations that the few examples of the self-check may not have covered.

    ``rows`` collects the examples of the block that should be checked. Others depend on values, for which a device
    would be waited for: ``unequal`` collects them where they are computed, and ``rows_of`` reads them. ``branch`` is
    the way that the pass took, in which it may treat the whole batch otherwise.

    Args:
        examples: the number of examples in the block.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.rows: set[int] = set()
        self.unequal: list[Tensor] = []
        self.branch: tuple[int, ...] = ()
        self._counted: list[Tensor] = []  # likewise, of counts over the batch, which may be a denominator

    def __call__(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Inspect a call of a torch function."""
        if func is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            for i in index:
                if isinstance(i, Tensor) and i.ndim > 0:
                    self._reordered(i)
        elif func in _REORDERS:
            self._reordered(*args[1:2])
        elif func is F.cross_entropy or func is F.nll_loss:
            self._check_ignored(**arguments(func, args, kwargs))
        elif func in _COUNTS:
            self._count(*args, **kwargs)
        elif self._counted and (func in _READS or (func in _SCALES and _scaled_by_number(args))):
            self.unequal += self._counted
            self._counted = []

    def _reordered(self, by: Any = None) -> None:
        self.rows |= {0, self.examples - 1}
        if isinstance(by, Tensor) and by.dtype is torch.bool:
            self.unequal += self._extremes(by)

    def _count(self, input: Any, dim: Any = None, *_: Any, **options: Any) -> None:
        """Remember a sum over the whole batch of a tensor without gradient."""
        if isinstance(input, Tensor) and not input.requires_grad and not input.is_complex():
            over = [] if dim is None else dim if isinstance(dim, (list, tuple)) else [dim]
            if not over or len(over) == input.ndim:
                self._counted += self._extremes(input)

    def _extremes(self, each: Tensor) -> list[Tensor]:
        """Whether sums differ along the first or last dimension, and the examples with the smallest and the largest."""
        if self.examples == 1 or each.is_nested or not each.numel() or each.numel() % self.examples:
            return []
        first, last = each.reshape(self.examples, -1).sum(1), each.reshape(-1, self.examples).sum(0)
        unequal = (first != first[0]).any()
        if len(each) != self.examples:
            unequal = unequal & (last != last[0]).any()
        return [torch.stack([unequal.to(torch.int64), first.argmin(), first.argmax()])]

    def _check_ignored(self, target: Tensor, ignore_index: int, reduction: str, **_: Any) -> None:
        """Ignored targets: unless all examples have equally many, a mean over the batch weights examples unequally."""
        if reduction != "mean" or target.is_floating_point() or not target.numel() or target.numel() % self.examples:
            return
        self.unequal += self._extremes(target == ignore_index)


def rows_of(unequal: Sequence[Tensor]) -> set[int]:
    """The rows that ``SuspectRows.unequal`` names, with a single wait for their device."""
    return named_rows(read_numbers(unequal))


def named_rows(unequal: Iterable[Sequence[float]]) -> set[int]:
    """The same of what was read."""
    return {int(row) for differ, *rows in unequal if differ for row in rows}


def _scaled_by_number(operands: Sequence[Any]) -> bool:
    """Whether a tensor with a gradient is multiplied or divided by a single number without one."""
    tensors = [t for t in operands if isinstance(t, Tensor)]
    return any(t.requires_grad for t in tensors) and any(t.numel() == 1 and not t.requires_grad for t in tensors)


def agreements(
    rows: Sequence[Tensor | None],
    truths: Sequence[Tensor],
    sizes: Tensor,
    largest: Tensor,
    tolerance: Tolerance = None,
) -> Tensor:
    """[parameter]: whether an example's gradients are right up to rounding errors, where they are.

    Args:
        rows: the gradients to check, [*shape]; None means zeros.
        truths: the gradients by plain autograd, which have entries.
        sizes: [parameter]: see ``peaks``.
        largest: the largest entry of the example's gradient over all parameters, or [parameter]; it sets the tolerance
            where a truth is zero up to rounding (as for a bias before a normalisation layer).
        tolerance: relative to the parameter's and to the largest entry; None: that of the dtype.
    """
    if not truths:
        return sizes.new_ones(0, dtype=torch.bool)
    limits: list[Any] = [
        (0.0, 0.0, 0.0) if row is None else (*(tolerance or tolerance_of(truth)), torch.finfo(truth.dtype).tiny)
        for row, truth in zip(rows, truths, strict=True)
    ]
    # of one kind as numbers, for which nothing goes to a device
    relative, floor, least = limits[0] if len(set(limits)) == 1 else sizes.new_tensor(limits).T
    unlike = torch.stack(list(_differences(rows, truths)))
    return widest(unlike) <= relative * sizes + floor * largest + least


def same(row: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: Tolerance = None) -> Tensor:
    """Whether an example's gradient is finite and the same in its block, as by ``differing``; not read."""
    _, largest, right = _compared(row, truth, tolerance)
    return (right & (largest < torch.inf)).all()


def tolerance_of(like: Tensor) -> tuple[float, float]:
    """Rounding errors of a gradient relative to its own and to the example's largest entry, by dtype."""
    return {torch.float64: (1e-9, 1e-13), torch.float32: (2e-4, 1e-6)}.get(like.dtype, (5e-2, 1e-2))


def peaks(values: Iterable[Tensor]) -> Tensor:
    """[tensor]: the largest magnitude of an entry of each; NaN if there is one, and a single 0 of no tensors."""
    return widest(torch.stack([*_peaks(list(values))] or [torch.zeros(())]))


def largest_entry(gradients: Iterable[Tensor]) -> Tensor:
    """The largest magnitude of an entry of one example's gradient, over all parameters."""
    return peaks(g for g in gradients if g.numel()).max()


def is_finite(gradient: Mapping[str, Tensor]) -> bool:
    """Whether all entries are finite."""
    return bool(largest_entry(gradient.values()).isfinite())


def _peaks(values: list[Tensor]) -> Sequence[Tensor]:
    if values and not values[0].is_cpu:
        return torch._foreach_norm(values, math.inf)  # few launches; on a CPU ten times as slow as what follows
    return [_peak(each) for each in values]


def _peak(values: Tensor) -> Tensor:
    """The largest magnitude of an entry; NaN if there is one. This is faster than ``isfinite`` and norms."""
    if values.numel() <= _SMALL or values.is_complex():
        return values.abs().max()
    return torch.stack(torch.aminmax(values)).abs().max()


def _differences(rows: Sequence[Tensor | None], truths: Sequence[Tensor]) -> Iterator[Tensor]:
    """The largest magnitude of an entry of each difference, in few launches, and with few entries at once."""
    ends = itertools.accumulate(truth.numel() for truth in truths)
    for _, group in itertools.groupby(zip(rows, truths, ends, strict=True), lambda each: each[2] // _TOGETHER):
        pairs = [(torch.zeros_like(truth) if row is None else row, truth) for row, truth, _ in group]
        yield from _peaks([*torch._foreach_sub([row for row, _ in pairs], [truth for _, truth in pairs])])


def smallest_scale(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """What the largest entry of a gradient counts as at least: those of zero up to rounding have entries of noise."""
    return 1e-4 * loss.detach().abs().max() / largest_entry(parameters).clamp_min(torch.finfo(loss.dtype).tiny)


def differing(
    row: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: Tolerance = None, scale: Tensor | None = None
) -> str | None:
    """The first parameter for which an example's gradient in its block is not that of the example alone.

    Args:
        row: the gradient in its block, by parameter; those that are missing are zero.
        truth: the gradient alone.
        tolerance: relative to the parameter's and to the largest entry; None: that of the dtype.
        scale: what the largest entry counts as at least; None: itself.
    """
    names, largest, right = _compared(row, truth, tolerance, scale)
    (finite,), agree = read_numbers([largest.isfinite(), right])
    if not finite:  # the attributor reports it, unless it is finite in the block
        return next((n for n, g in row.items() if n in truth and bool(g.any())), None) if is_finite(row) else None
    return next((n for n, same in zip(names, agree, strict=True) if not same), None)


def _compared(
    row: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: Tolerance, scale: Tensor | None = None
) -> tuple[list[str], Tensor, Tensor]:
    """The parameters with entries, the largest entry, and by parameter whether the gradient is right."""
    true = {name: gradient for name, gradient in truth.items() if gradient.numel()}
    sizes = peaks(true.values())
    largest = sizes.max() if scale is None else torch.maximum(sizes.max(), scale.to(sizes))
    right = agreements([row.get(name) for name in true], list(true.values()), sizes, largest, tolerance)
    return list(true), largest, right
