"""Cross-entropies whose values and gradients keep their digits where the model is certain.

torch computes the gradient by the logit of the true class as p - 1, which is 0 once p rounds to 1: in float32 from a
gap of 17 between the logits. Here it is minus the sum of the others' probabilities. The functions have the signatures
of those of ``torch.nn.functional`` that they stand for. They are made of differentiable operations, so that their
derivatives of any order are as exact, need no higher precision, and run under ``torch.func``.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn import functional as F
from torch.nn._reduction import legacy_get_string

_KINDS = (torch.float32, torch.float64)
# More logits are taken in slices of so many.
_MANY = 2**22


def _as_on_cuda(input: Tensor) -> Tensor:
    """Logits in float32 under autocast, which computes these functions in it on CUDA, but not on every device."""
    low = input.dtype in (torch.float16, torch.bfloat16)
    return input.float() if low and torch.is_autocast_enabled(input.device.type) else input


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """As ``torch.nn.functional.log_softmax``."""
    input = _as_on_cuda(input)
    logits = input if dtype is None else input.to(dtype)
    if dim is None or logits.dtype not in _KINDS or not logits.numel() or not logits.ndim:
        return F.log_softmax(input, dim, dtype=dtype)
    if _are_many(logits) and dim % logits.ndim:
        return _InSlices.apply(partial(_log_softmax, dim=dim), logits)  # type: ignore[no-any-return]
    return _log_softmax(logits, dim)


def _log_softmax(x: Tensor, dim: int) -> Tensor:
    first = x.detach().argmax(dim, keepdim=True)  # one class, also where several are equally probable
    top = x.gather(dim, first)
    shape = [1] * x.ndim
    shape[dim] = -1
    own = first == torch.arange(x.shape[dim], device=x.device).view(shape)
    # The largest logit enters the differences as a constant 0, so that its gradient is minus the sum of the others'.
    below = (x - top).masked_fill_(own, -torch.inf)
    others = below.exp().sum(dim, keepdim=True)
    one = top.detach() * 0 + 1  # NaN where torch's result is: of an infinite logit
    return below.masked_fill(own, 0.0).sub_(others.log1p() * one)  # in place: there may be many classes


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As ``torch.nn.functional.cross_entropy``."""
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce, emit_warning=False)
    input = _as_on_cuda(input)
    classes = 1 if input.ndim > 1 else 0
    soft = target.is_floating_point()
    odd = input.dtype not in _KINDS or not input.numel() or not input.ndim or not 0 <= label_smoothing <= 1
    if odd or (soft and target.shape != input.shape):
        return F.cross_entropy(
            input, target, weight, None, ignore_index, None, reduction=reduction, label_smoothing=label_smoothing
        )
    if _are_many(input) and classes and not soft and weight is None and not label_smoothing:
        each = partial(_of_targets, ignore_index=ignore_index)
        return _reduced(_InSlices.apply(each, input, target), target != ignore_index, reduction)
    log_p = _log_softmax(input, classes)
    if soft:
        return _of_probabilities(log_p, target, weight, reduction, label_smoothing, classes)
    nll = F.nll_loss(log_p, target, weight, ignore_index=ignore_index, reduction=reduction)
    if not label_smoothing:
        return nll
    return (1 - label_smoothing) * nll + label_smoothing * _of_any_class(
        log_p, target, weight, ignore_index, reduction, classes
    )


def _of_targets(x: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The loss of each target."""
    return F.nll_loss(_log_softmax(x, 1), target, ignore_index=ignore_index, reduction="none")


def _reduced(each: Tensor, counts: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.sum() / counts.sum()


def _are_many(logits: Tensor) -> bool:
    """Whether copies of logits would take much memory, as of a large vocabulary; not inside ``torch.func``."""
    return logits.numel() > _MANY and len(logits) > 1 and _functorch.peek_interpreter_stack() is None


class _InSlices(torch.autograd.Function):
    """A function of logits, applied to slices of their first dimension, and again for derivatives.

    Nothing is kept but the logits, where each of the function's steps would keep a copy of them.
    """

    @staticmethod
    def forward(ctx: Any, func: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
        """Apply ``func`` to the logits and other tensors of the same length."""
        ctx.func = func
        ctx.save_for_backward(logits, *others)
        found = [func(*(of[rows] for of in (logits, *others))) for rows in _slices(logits)]
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        """By slices; as a whole where it is differentiated once more, or vectorised."""
        logits, *others = ctx.saved_tensors
        nothing = [None] * len(others)
        again = torch.is_grad_enabled()
        if again or _is_batched(gradient):
            with torch.enable_grad():
                value = ctx.func(logits, *others)
            return None, *torch.autograd.grad(value, logits, gradient, create_graph=again), *nothing
        found = torch.empty_like(logits)
        for rows in _slices(logits):
            own = logits[rows].detach().requires_grad_()
            with torch.enable_grad():
                value = ctx.func(own, *(other[rows] for other in others))
            found[rows] = torch.autograd.grad(value, own, gradient[rows])[0]
        return None, found, *nothing


def _is_batched(gradient: Tensor) -> bool:
    """Whether it stands for several, as in a vectorised backward pass."""
    return _functorch.is_batchedtensor(gradient) or _functorch.is_legacy_batchedtensor(gradient)


def _slices(logits: Tensor) -> Iterator[slice]:
    step = max(1, _MANY // logits[0].numel())
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def _of_probabilities(
    log_p: Tensor, target: Tensor, weight: Tensor | None, reduction: str, smoothing: float, classes: int
) -> Tensor:
    if smoothing:
        target = target * (1 - smoothing) + smoothing / log_p.shape[classes]
    each = -(_weighted(log_p, weight, classes) * target).sum(classes)
    if reduction == "mean":
        return each.sum() / max(1, each.numel())
    return each if reduction == "none" else each.sum()


def _of_any_class(
    log_p: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, classes: int
) -> Tensor:
    """The mean over all classes of their losses, which label smoothing adds."""
    counts = target != ignore_index
    each = -_weighted(log_p, weight, classes).sum(classes).where(counts, 0.0) / log_p.shape[classes]
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    if weight is None:
        return each.sum() / counts.sum()
    return each.sum() / weight[target.where(counts, 0)].where(counts, 0.0).sum()


def _weighted(log_p: Tensor, weight: Tensor | None, classes: int) -> Tensor:
    if weight is None:
        return log_p
    return log_p * weight.view([-1 if d == classes else 1 for d in range(log_p.ndim)])


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """As ``torch.nn.functional.binary_cross_entropy_with_logits``."""
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce, emit_warning=False)
    input = _as_on_cuda(input)
    if input.dtype not in _KINDS or input.shape != target.shape:
        return F.binary_cross_entropy_with_logits(input, target, weight, None, None, reduction, pos_weight)
    positive = target if pos_weight is None else target * pos_weight
    each = -(positive * F.logsigmoid(input) + (1 - target) * F.logsigmoid(-input))
    if weight is not None:
        each = each * weight
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()


EXACT: dict[Any, Any] = {
    F.cross_entropy: cross_entropy,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    F.log_softmax: log_softmax,
    torch.log_softmax: lambda input, dim, dtype=None: log_softmax(input, dim, dtype=dtype),
    torch.special.log_softmax: lambda input, dim, dtype=None: log_softmax(input, dim, dtype=dtype),
    Tensor.log_softmax: lambda input, dim, dtype=None: log_softmax(input, dim, dtype=dtype),
}
"""The functions here by those of torch that they stand for."""
