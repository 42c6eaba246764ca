"""The weights of examples in a batch's mean over tokens, pixels or class weights: how many of them each example has."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.data.examples import Examples
from lightning_influence.devices import wide
from lightning_influence.gradients.rules.rule import arguments
from lightning_influence.module.copies import Copies
from lightning_influence.module.random_state import seed_for
from lightning_influence.module.task import Task
from lightning_influence.module.torch_functions import Args, Function, FunctionWatch, Kwargs, functions_named
from lightning_influence.module.transforms import without_transforms

Key = tuple[str, int]
"""A kind of operation, and how many of this kind came before it in the forward pass."""

_SUMS = functions_named("sum mean nansum nanmean count_nonzero")
_LOSSES = functions_named(
    "cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits poisson_nll_loss",
    (F,),
)
_DIVISIONS = functions_named("div divide true_divide") | {Tensor.__truediv__, Tensor.div_}
_SELECTS = functions_named("masked_select")
_FINDS = functions_named("nonzero argwhere") | {torch.where}


class CountWatch(FunctionWatch):
    """Records, during a forward pass, the numbers that the denominator of a mean may be the sum of.

    ``found`` has them by operation: the class weights of the targets that a cross-entropy does not ignore, the number
    of elements of a mean, masks that select elements, divisors, and what is summed over the batch without a gradient.

    Args:
        only: the operation to record; None: all.
    """

    def __init__(self, only: Key | None = None) -> None:
        super().__init__()
        self._only = only
        self._met: dict[str, int] = {}
        self.found: dict[Key, Tensor] = {}
        self.unequal: dict[Key, Tensor] = {}
        """By cross-entropy with class weights: whether they are unequal."""

    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Record what ``func`` may count, and run it."""
        for name, values, weighted in _counted(func, args, kwargs):
            key = name, self._met.get(name, 0)
            self._met[name] = key[1] + 1
            if self._only in (None, key) and (counted := without_transforms(values())) is not None:
                self.found[key] = counted
                self.unequal |= {} if weighted is None else {key: weighted}
        return func(*args, **kwargs)

    def totals(self) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
        """The sums over the whole batch, and by cross-entropy whether its class weights are unequal."""
        return {key: values.sum() for key, values in self.found.items()}, self.unequal


_Counted = tuple[str, Callable[[], Tensor], Tensor | None]


def _counted(func: Function, args: Args, kwargs: Kwargs) -> Iterator[_Counted]:
    """What a call may count: the kind of operation, a function that computes it, whether class weights are unequal."""
    first = args[0] if args else kwargs.get("input")
    if func in _SUMS and isinstance(first, Tensor):
        yield from _summed(func, first, *args[1:], **kwargs)
    elif func in _LOSSES and isinstance(first, Tensor):
        yield from _averaged(func, first, args, kwargs)
    elif func in _DIVISIONS and isinstance(first, Tensor) and first.requires_grad:
        by = args[1] if len(args) > 1 else kwargs.get("other")
        if isinstance(by, (int, float)) or (isinstance(by, Tensor) and by.numel() == 1 and not by.requires_grad):
            yield "divisor", partial(wide, torch.as_tensor(by).detach()), None
    elif func is Tensor.tolist and isinstance(first, Tensor) and not first.is_complex():
        yield "list", partial(wide, first.detach()), None
    for mask in _masks(func, first, args, kwargs):
        yield "mask", partial(wide, mask), None


def _summed(func: Function, values: Tensor, *args: Any, **kwargs: Any) -> Iterator[_Counted]:
    """Sums without a gradient over the whole batch, or over all but one dimension; or the elements of a mean."""
    if values.is_complex():
        return
    name, over = func.__name__, _dimensions(values, *args, **kwargs)
    if name == "nanmean" and over == values.ndim:
        yield name, partial(wide, values.detach().isnan().logical_not()), None
    elif name == "mean" and values.requires_grad and over == values.ndim:
        yield "elements", torch.tensor(values.numel()).double, None
    elif not values.requires_grad and over in (values.ndim, values.ndim - 1):
        found = {"count_nonzero": lambda: values != 0, "nansum": lambda: values.nan_to_num(0.0)}
        yield "sum" if over == values.ndim else "sums", lambda: wide(found.get(name, lambda: values)()), None


def _averaged(func: Function, prediction: Tensor, args: Args, kwargs: Kwargs) -> Iterator[_Counted]:
    """Over what a loss function averages."""
    bound = arguments(func, args, kwargs)
    if bound["reduction"] != "mean":
        return
    target, weight = bound["target"], bound.get("weight")
    if func not in (F.cross_entropy, F.nll_loss) or target.is_floating_point():
        yield "elements", torch.tensor(prediction.numel()).double, None
        return
    plain = None if weight is None else without_transforms(weight)
    unequal = None if plain is None else (plain != plain[0]).any()
    yield "cross entropy", lambda: _class_weights(target, weight, bound["ignore_index"]), unequal


def _masks(func: Function, first: Any, args: Args, kwargs: Kwargs) -> Iterator[Tensor]:
    """The masks by which a call selects elements."""
    if func is Tensor.__getitem__:
        for index in args[1] if isinstance(args[1], tuple) else (args[1],):
            if isinstance(index, Tensor) and index.dtype is torch.bool and index.ndim:
                yield index
    elif func in _SELECTS:
        yield args[1] if len(args) > 1 else kwargs["mask"]
    elif func in _FINDS and len(args) + len(kwargs) == 1 and isinstance(first, Tensor):
        yield first != 0


def _class_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    valid = target != ignore_index
    if weight is None:
        return wide(valid)
    return wide(torch.where(valid, weight.detach()[torch.where(valid, target, 0)], 0.0))


def _dimensions(input: Tensor, dim: Any = None, *_: Any, **options: Any) -> int:
    """How many dimensions a sum is over."""
    dim = options.get("dim", dim)
    over = [] if dim is None else dim if isinstance(dim, (list, tuple)) else [dim]
    return len(over) or input.ndim


def per_example(values: Tensor, examples: int, layout: int) -> Tensor | None:
    """[example]: sums of what was counted in a batch; None if it cannot have this layout.

    Args:
        values: what was counted.
        examples: the size of the batch.
        layout: the dimension of the examples after which all others follow, or -1 for the last.
    """
    if values.numel() % examples:
        return None
    if layout == 1:
        return values.transpose(0, 1).reshape(examples, -1).sum(1) if values.shape[1:2] == (examples,) else None
    return values.reshape(examples, -1).sum(1) if layout == 0 else values.reshape(-1, examples).sum(0)


def has_none(key: Key, counted: float, loss: float, task: Task, examples: Examples, example: int) -> bool:
    """Whether an example has none of what its loss is divided by, as in ``total / max(boxes, 1)``: two have no more.

    Args:
        key: the operation that counts.
        counted: by it, in the example alone.
        loss: of the example alone.
        task: the module with its loss.
        examples: the dataset.
        example: its id.
    """
    if key[0] != "divisor" or loss != 0 or not 0 < counted <= 1:
        return False
    with CountWatch(key) as watch:
        task(task.to_device(examples.some([example, example])))
    return key in watch.found and float(watch.found[key].sum()) == counted


@dataclass(frozen=True)
class TokenCounter:
    """Counts what the examples have of that over which a batch's loss is a mean; made by ``probe``.

    Args:
        key: the operation that counts.
        layout: where the examples are in what it counts, see ``per_example``; None: each is counted as a batch of one.
    """

    key: Key
    layout: int | None

    def weights(self, task: Task, examples: Examples) -> Tensor:
        """[example] float64: the counts relative to their mean, by one forward pass over the dataset.

        Zero where an example has none, so that it does not count in its batch.
        """
        found = []
        for block in examples.blocks():
            whole = block.batch, examples, block.start, block.size
            counted = None if self.layout is None else self._of(task, *whole)
            if counted is None:
                each = [self._of(task, block.one(i), examples, i, 1) for i in block.ids]
                counted = torch.cat([torch.zeros(1, dtype=torch.float64) if one is None else one for one in each])
            found.append(counted)
        counts = torch.cat(found)
        return counts / counts.mean() if bool(counts.any()) else torch.ones_like(counts)

    def _of(self, task: Task, batch: Any, examples: Examples, example: int, size: int) -> Tensor | None:
        batch = task.to_device(batch)
        seed_for(example)
        with CountWatch(self.key) as watch:
            loss = task(batch)
        if self.key not in watch.found:
            return None
        if size == 1 and self.key[0] == "divisor":  # a plain number, which is on the CPU
            total = float(watch.found[self.key].sum())
            if has_none(self.key, total, float(loss.detach()), task, examples, example):
                return torch.zeros(1, dtype=torch.float64)
        counted = per_example(watch.found[self.key], size, self.layout or 0)
        if counted is not None and isinstance(batch, Copies) and self.layout is not None:
            counted = counted / 2
        return None if counted is None else counted.cpu()
