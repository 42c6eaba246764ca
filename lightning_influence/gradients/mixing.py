"""Finds where a step may mix the examples of its batch: what it computes of several of them, beside sums."""

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_influence.module.task import Task
from lightning_influence.module.torch_functions import Args, Function, FunctionWatch, Kwargs, operands_of, words
from lightning_influence.types import Batch, tensors_in


class _Kind(IntEnum):
    """How a tensor follows from the batch."""

    NONE = 0
    """Not at all."""
    COUNT = 1
    """Counts over the batch; division by them is followed elsewhere (``TokenCounter``, ``SuspectRows``)."""
    SUM = 2
    """Sums over the examples of values of each, and linear functions of them."""
    EACH = 3
    """Values of each example."""
    MIXED = 4
    """Any other function of several examples."""


_Found = tuple[_Kind, str]
_NONE, _EACH = (_Kind.NONE, ""), (_Kind.EACH, "")


# By name, without the underscores of methods in place and of operators.
_SUMS = words("sum mean nansum nanmean count_nonzero")
_JOINT = words(
    "max min amax amin aminmax any all std var std_mean var_mean norm vector_norm logsumexp median nanmedian quantile "
    "prod argmax argmin mode unique bincount histc cov corrcoef cdist pdist sort argsort topk cumsum cumprod cummax "
    "cummin logcumsumexp softmax softmin log_softmax normalize roll flip diff kthvalue gather take_along_dim"
)
_OVER_LAST = words("sort argsort topk kthvalue diff")
_NUMBER_FIRST = words("roll topk kthvalue diff norm vector_norm quantile")
_PRODUCTS = words("matmul rmatmul mm mv addmm addmv")
_SELECTS = words("getitem select unbind iter masked_select nonzero index_select argwhere")
_LINEAR = words(
    "add radd iadd sub rsub isub subtract neg negative sum mean stack cat to float double half bfloat16 type type_as "
    "clone detach contiguous cpu cuda view reshape squeeze unsqueeze flatten expand getitem set as_tensor"
)
_DIVIDES = words("div truediv itruediv idiv divide true_divide")
_SCALES = words("mul rmul imul multiply") | _DIVIDES
_FINITE = words("isfinite isnan isinf")
_READS = words("item tolist bool int float index numpy equal allclose array")


class MixingWatch(FunctionWatch):
    """Follows, during a forward pass, which values are of each example, sums over them, or made of several otherwise.

    It tells what the step may do with other examples than those of the pass, which no check of a few can know, such as
    ``torch.where(rare.any(), ...)`` or a mean that is clamped. Whether it does is for checks to find out.

    Args:
        examples: how many the batch has.
        before: of a pass of a batch of another size: the dimensions that differ are those of the examples. Without it,
            those whose size is a multiple of the batch's are taken for them.
    """

    def __init__(self, examples: int, before: "MixingWatch | None" = None) -> None:
        super().__init__()
        self.why: str | None = None
        """What the loss follows from that mixes examples, such as "`clamp` of a sum over the batch"; None: nothing."""
        self.reads = False
        """Whether the pass read values that follow from the batch as Python's numbers."""
        self.in_hooks = False
        """Whether examples may be mixed before the step."""
        self._examples = examples
        self._found: dict[int, _Found] = {}
        self._others: set[int] = set()
        self._kept: list[Any] = []  # so that no other tensor has the id of one
        self._calls: list[tuple[str, list[tuple[int, ...]]]] = []
        self._before = iter(() if before is None else before._calls)
        self._examples_before = 0 if before is None else before._examples
        self._shapes: dict[int, tuple[int, ...]] = {}  # of the same tensors in the pass before

    def around(self, task: Task) -> tuple[Callable[[Batch], Batch], Callable[[Batch], Tensor]]:
        """What moves a batch to the device, and the step, both followed."""
        return partial(self.move, task.to_device), partial(self.run, task)

    def move(self, hooks: Callable[[Batch], Batch], batch: Batch) -> Batch:
        """Follow the hooks of the batch's transfer to its device; returns what the step gets."""
        self._begin(batch)
        with self:
            moved = hooks(batch)
        self.in_hooks = any(self._found.get(id(leaf), _NONE)[0] is _Kind.MIXED for leaf in tensors_in(moved))
        self._begin(moved)
        return moved

    def _begin(self, batch: Batch) -> None:
        leaves = tensors_in(batch)
        self._align("", leaves)
        for leaf in leaves:
            if id(leaf) not in self._found:
                self._note(leaf, _EACH)

    def run(self, step: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """Follow a step's pass of a batch as it was moved; returns its loss."""
        with self:
            loss = step(batch)
        kind, why = self._found.get(id(loss), _EACH)
        self.why = why if kind is _Kind.MIXED or (kind is _Kind.COUNT and why) else None
        self._kept.clear()
        return loss

    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run and follow a call."""
        name = getattr(func, "__name__", "").strip("_").removeprefix("linalg_")
        with torch._C.DisableTorchFunction():  # what is read here is no part of the pass that a tape may record
            of = [self._known(operand) for operand in operands_of(args, kwargs)]
        output = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._follow(name, args, kwargs, of, output)
        return output

    def _follow(self, name: str, args: Args, kwargs: Kwargs, of: Sequence[_Found], output: Any) -> None:
        """Note how the output of a call follows from the batch."""
        written = args[:1] if name in ("setitem", "set") else ()
        made = [t for t in operands_of((output, *written), {}) if isinstance(t, Tensor)]
        self._align(name, made)
        found = max(of, default=_NONE)
        if found == _NONE or (name in _FINITE and found[0] < _Kind.EACH):  # losses that are not finite are reported
            self._others.update(map(id, made))
            return
        self.reads |= name in _READS
        if name != "get" and found[0] is _Kind.EACH:  # that is an attribute, such as the transposed
            found = self._of_each(name, args, kwargs, {kind for kind, _ in of}, made)
        elif name != "get" and found[0] < _Kind.EACH:
            found = _of_sums(name, of)
        for tensor in made:
            self._note(tensor, found)

    def _known(self, value: Any) -> _Found:
        """How an operand follows from the batch; one that was made unseen, with a gradient, is of each example."""
        if not isinstance(value, Tensor):
            return _NONE
        unseen = value.grad_fn is not None and id(value) not in self._others
        return self._found.get(id(value), _EACH if unseen else _NONE)

    def _align(self, name: str, made: Sequence[Tensor]) -> None:
        """Find the shapes that the results of a call had in the pass before."""
        shapes = [_sizes(tensor) for tensor in made]
        self._calls.append((name, shapes))
        called, before = next(self._before, ("", []))
        if called != name or [*map(len, shapes)] != [*map(len, before)]:
            self._before = iter(())  # it went another way
        else:
            self._shapes |= {id(tensor): shape for tensor, shape in zip(made, before, strict=True)}
            self._kept += made

    def _note(self, tensor: Tensor, found: _Found) -> None:
        self._found[id(tensor)] = found
        self._kept.append(tensor)

    def _of_each(self, name: str, args: Args, kwargs: Kwargs, kinds: set[_Kind], made: Sequence[Tensor]) -> _Found:
        """What an operation gives of values of each example, perhaps with sums."""
        if _Kind.SUM in kinds or (_Kind.COUNT in kinds and name not in _SCALES):
            return _Kind.MIXED, f"`{name}` of values of each example and a sum over the batch"
        if why := self._paired(name, (*args, *kwargs.values()), made):
            return _Kind.MIXED, why
        first = next(t for t in operands_of(args, kwargs) if self._known(t) == _EACH)
        dimension = self._dimension(first)
        if dimension is None or not made:
            return _EACH
        over = dimension in _dimensions(name, first, args, kwargs)
        if dimension == 0 and self._by_position(name, args, kwargs, over):
            return _Kind.MIXED, "a part of the batch, chosen by position"
        if name in _JOINT and over and not (name in ("max", "min") and isinstance(args[-1], Tensor) and len(args) > 1):
            return _Kind.MIXED, f"`{name}` over the batch"
        kept = self._dimension(made[0]) is not None or made[0].shape[:1] == first.shape[:1]
        if name in _SELECTS or (kept and not (name in _SUMS and over)):
            return _EACH
        return (_Kind.SUM if made[0].requires_grad else _Kind.COUNT), ""

    def _dimension(self, tensor: Tensor) -> int | None:
        """Where the examples are."""
        sizes = _sizes(tensor)
        if (before := self._shapes.get(id(tensor))) is not None and len(before) == len(sizes):
            return next((d for d, (a, b) in enumerate(zip(sizes, before, strict=True)) if a != b), None)
        return next((d for d, size in enumerate(sizes) if size and size % self._examples == 0), None)

    def _paired(self, name: str, operands: Sequence[Any], made: Sequence[Tensor]) -> str | None:
        """What has two dimensions of the examples, in this pass and in the one before, or multiplies away one."""
        for tensor in made:
            pairs = zip(_sizes(tensor), self._shapes.get(id(tensor), ()), strict=False)
            if [*pairs].count((self._examples, self._examples_before)) > 1:
                return f"`{name}` of pairs of examples"
        factors = [t for t in operands if isinstance(t, Tensor)][-2:]
        if name not in _PRODUCTS or len(factors) < 2 or not made[0].ndim:
            return None
        left, right = factors[::-1] if name == "rmatmul" else factors
        ends = ((left, left.ndim - 1), (right, max(0, right.ndim - 2)))
        over = any(self._known(t) != _NONE and self._dimension(t) == end for t, end in ends)
        return f"`{name}` that sums over the batch" if over else None

    def _by_position(self, name: str, args: Args, kwargs: Kwargs, over: bool) -> bool:
        """Whether examples are taken by numbers that do not follow from the batch."""
        if name != "getitem" and not (name == "index_select" and over):
            return False
        index = kwargs.get("index", args[-1])
        if isinstance(index, Tensor):
            return index.ndim == 1 and index.dtype is not torch.bool and self._known(index) == _NONE
        first = index[0] if isinstance(index, tuple) and index else index
        return type(first) is int or (isinstance(first, slice) and first != slice(None))


def _of_sums(name: str, of: Sequence[_Found]) -> _Found:
    """What an operation gives of sums and counts."""
    sums = sum(kind is _Kind.SUM for kind, _ in of)
    by_sum = name in _DIVIDES and sums > 0 and of[0][0] is not _Kind.SUM
    if name in _LINEAR or (name in _SCALES and sums < 2 and not by_sum):
        return max(of)
    return (_Kind.MIXED if sums else _Kind.COUNT), f"`{name}` of a sum over the batch"


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return () if tensor.is_nested else tuple(tensor.shape)


def _dimensions(name: str, tensor: Tensor, args: Args, kwargs: Kwargs) -> set[int]:
    """The dimensions that an operation runs over; all where it is not told."""
    given = kwargs.get("dim", kwargs.get("dims", kwargs.get("axis")))
    if given is None:
        numbers = [a for a in args[1:] if type(a) is int or (isinstance(a, (tuple, list)) and a)]
        numbers = numbers[1:] if name in _NUMBER_FIRST else numbers
        given = numbers[0] if numbers else -1 if name in _OVER_LAST else 1 if name == "normalize" else None
    if given is None or not tensor.ndim:
        return set(range(tensor.ndim))
    return {d % tensor.ndim for d in (given if isinstance(given, (tuple, list)) else (given,)) if type(d) is int}
