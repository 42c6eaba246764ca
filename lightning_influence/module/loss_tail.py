"""Computes the part of a loss after the network's last layer in float64, where float32 may lose the digits.

Such losses are binary cross-entropies of ``sigmoid(x)``, logarithms of ``softmax(x)``, focal losses. The network itself
stays in float32.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lightning_influence.module.exact_losses import put_back, taken_off
from lightning_influence.module.in_double import LOW, in_double, lowered, raised
from lightning_influence.module.torch_functions import Args, Function, FunctionWatch, Kwargs, operands_of, words, writes

# Functions that lose digits near the ends of their range, or whose results are then subtracted from one another.
_CRITICAL = words(
    "sigmoid expit logit tanh softmax softmin gumbel_softmax softplus logsigmoid log_sigmoid logsumexp logaddexp "
    "logaddexp2 log log2 log10 log1p exp exp2 expm1 erf erfc ndtr log_ndtr entr xlogy xlog1py binary_cross_entropy "
    "ctc_loss cosine_similarity cosine_embedding_loss normalize norm vector_norm cdist pairwise_distance acos "
    "asin atanh"
)
# Of these, code that modes see calls versions that keep the digits.
_EXACT = words("log_softmax binary_cross_entropy_with_logits cross_entropy_loss log_sigmoid_forward")

# Losses whose gradients lose digits where the model is certain, and how a weight is changed by a gradient.
_LOSSES = words("cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits")
_STEPS = words("sub add rsub radd addcmul addcdiv lerp")


@dataclass(frozen=True)
class LossTail:
    """Where the part of a loss after the network's last layer begins.

    Args:
        layers: how many operations with a parameter come before it; infinite: nothing is computed in float64; None: it
            is not known yet.
        waits: whether it begins with the first critical function, since their number varies.
        dtype: of the loss without it.
        doubt: a function after the last layer that may lose digits in float32, and why it does not run in float64.
    """

    layers: float | None = None
    waits: bool = False
    dtype: torch.dtype = torch.float32
    doubt: str | None = None

    @property
    def is_used(self) -> bool:
        """Whether some of the loss is computed in float64."""
        return self.layers is not None and self.layers < math.inf

    @contextlib.contextmanager
    def in_double(self, module: nn.Module) -> Iterator[None]:
        """Compute the part in float64 inside."""
        with _InDouble(self, module) if self.is_used else contextlib.nullcontext():
            yield


NO_TAIL = LossTail(math.inf)


class _LayerWatch(FunctionWatch):
    """Sees the operations of a module's parameters with activations, its layers.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters = frozenset(map(id, module.parameters()))  # those of now: others may stand for them
        self._derived: dict[int, Tensor] = {}  # made of parameters alone, such as a transposed weight

    def weights(self, args: Args, kwargs: Kwargs) -> tuple[list[Tensor], bool]:
        """The operands that are parameters or made of them alone, and whether there are no others."""
        operands = [a for a in operands_of(args, kwargs) if isinstance(a, Tensor)]
        weights = [a for a in operands if id(a) in self._parameters or id(a) in self._derived]
        return weights, len(weights) == len(operands)

    def derived(self, output: Any) -> Any:
        """The output of an operation of parameters alone."""
        if isinstance(output, Tensor) and output.ndim:
            self._derived[id(output)] = output
        return output


class _Search(_LayerWatch):
    """Finds, during a forward pass, where the part after the last layer begins."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._layers: list[tuple[Any, int]] = []
        self._before, self._after = "", ""  # a critical function that was called before, after the last layer
        self._unseen: str | None = None
        self._loss, self._stepped = "", ""  # a loss that was called, and one whose gradient then changed a weight
        self._is_inside = False

    def found(self, dtype: torch.dtype) -> LossTail:
        """Where it begins. A step that uses a layer again may do so as often as its data say."""
        repeats = len(set(self._layers)) < len(self._layers)
        doubt = self._unseen and f"`{self._unseen}` in code that torch's modes do not see, such as TorchScript,"
        doubt = doubt or (self._stepped and f"`{self._stepped}` before a step of its own along the gradient,") or None
        if not self._after or (repeats and self._before):
            again = f"`{self._after}` after layers that may be used another number of times," if self._after else None
            return LossTail(math.inf, dtype=dtype, doubt=doubt or again)
        return LossTail(0 if repeats else len(self._layers), repeats, dtype, doubt)

    def dispatched(self, name: str) -> None:
        """Called with the name of every operator that runs, also inside TorchScript."""
        if not self._is_inside and name.strip("_") in _CRITICAL | _EXACT:
            self._unseen = name.strip("_")

    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run and follow a call."""
        outside, self._is_inside = not self._is_inside, True
        try:
            output = func(*args, **kwargs)
        finally:
            self._is_inside = not outside
        weights, alone = self.weights(args, kwargs)
        if weights and alone:
            return self.derived(output)
        if weights:
            if self._loss and func.__name__.strip("_") in _STEPS and _are_matrices(operands_of(args, kwargs)):
                self._stepped = self._loss
            self._unseen = None
            self._layers.append((func, id(weights[0])))
            self._before, self._after = self._before or self._after, ""
        if _is_critical(func):
            self._after = func.__name__
        if func.__name__ in _LOSSES:
            self._loss = func.__name__
        return output


class _OperatorWatch(TorchDispatchMode):
    """Tells a search about the operators that run."""

    def __init__(self, search: _Search) -> None:
        super().__init__()
        self._search = search

    def __torch_dispatch__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        self._search.dispatched(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _InDouble(_LayerWatch):
    """While active, runs the operations after the last layer in float64."""

    def __init__(self, tail: LossTail, module: nn.Module) -> None:
        super().__init__(module)
        self._left, self._waits = tail.layers or 0, tail.waits
        self._raised: dict[int, tuple[Tensor, int, Tensor]] = {}

    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run and follow a call."""
        weights, alone = self.weights(args, kwargs)
        if weights and alone:
            return self.derived(func(*args, **kwargs))
        if weights:  # should one come later than expected, whatever has its gradient expects float32
            self._left -= 1
            return func(*tree_map(lowered, tuple(args)), **tree_map(lowered, dict(kwargs)))
        if self._left <= 0 and self._waits and _is_critical(func):
            self._waits = False
        if self._left > 0 or self._waits:
            return func(*args, **kwargs)
        copied = self._copy_of(args[0]) if args and writes(func) else None
        if copied is None:
            return in_double(func, args, kwargs, self._once)
        if func.__name__ == "__set__":  # of its memory or gradient: the copy is made anew
            del self._raised[id(args[0])]
            return in_double(func, args, kwargs, self._once)
        # Views of the copy see what is written; so does whatever the original is given to unseen, with its gradient.
        output = in_double(func, (self._once(args[0]), *args[1:]), kwargs, self._once)
        args[0].copy_(copied)
        self._raised[id(args[0])] = args[0], args[0]._version, copied
        return args[0] if isinstance(output, Tensor) else output

    def _once(self, value: Any) -> Any:
        """As ``raised``, but each tensor once: the parts of its gradient are summed in float64, too."""
        if not isinstance(value, Tensor) or value.dtype not in LOW:
            return raised(value)
        copied = self._copy_of(value)
        if copied is None:
            with torch.inference_mode(False):  # it may be needed again where there are gradients
                copied = raised(value)
            self._raised[id(value)] = value, value._version, copied
        return copied if torch.is_grad_enabled() else copied.detach()

    def _copy_of(self, value: Any) -> Tensor | None:
        """The copy of a tensor that is in use, unless the tensor has been written into since."""
        known = self._raised.get(id(value))
        return None if known is None or known[1] != value._version else known[2]


def find_tail(loss: Callable[[], Tensor], module: nn.Module) -> LossTail:
    """Find where the part of a loss after the network's last layer begins, and whether it runs in float64.

    Args:
        loss: computes it; what it raises is left to its next call.
        module: the module.
    """
    above, found = taken_off(), LossTail()  # they watch what the passes below are not part of
    try:
        with contextlib.suppress(Exception), _Search(module) as search, _OperatorWatch(search):
            found = search.found(loss().dtype)
        if found.is_used:
            try:
                with found.in_double(module):
                    loss()
            except Exception:
                return LossTail(math.inf, doubt=found.doubt)
        return found
    finally:
        put_back(above)


def _is_critical(func: Function) -> bool:
    return getattr(func, "__name__", "").removeprefix("special_").removesuffix("_") in _CRITICAL


def _are_matrices(operands: Iterator[Any]) -> bool:
    """Whether there are two tensors of the same shape, with at least two dimensions: unlike a bias and its layer."""
    shapes = [operand.shape for operand in operands if isinstance(operand, Tensor)]
    return len(shapes) > 1 and len(set(shapes)) == 1 and len(shapes[0]) > 1
