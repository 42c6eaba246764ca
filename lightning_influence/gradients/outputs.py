"""Finds the network's outputs: the tensors through which alone the loss depends on the parameters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Losses of one prediction, their first argument; convex in it.
_LOSSES = frozenset(
    getattr(F, name)
    for name in (
        "cross_entropy",
        "nll_loss",
        "mse_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "huber_loss",
        "smooth_l1_loss",
        "poisson_nll_loss",
        "kl_div",
        "l1_loss",
    )
)
# What stands between the logits and a loss of probabilities: the logits are the output then.
_LINKS = frozenset({"log_softmax", "sigmoid", "logsigmoid", "log_sigmoid"})
_SHAPES = frozenset({"squeeze", "unsqueeze", "view", "reshape", "flatten", "permute", "transpose"})


class OutputWatch(TorchFunctionMode):
    """While active, notes what enters a loss, and what the last operation with a parameter gives.

    Args:
        parameters: those that count.
        last_layer: take the last operation's output even where a loss function is called.
    """

    def __init__(self, parameters: Iterable[Tensor], last_layer: bool = False) -> None:
        super().__init__()
        self._parameters = {id(p) for p in parameters}
        self._last_layer = last_layer
        self._entered: list[Tensor] = []
        self._last: Tensor | None = None
        self._links: dict[int, tuple[Tensor, Tensor]] = {}  # the link's output is kept: its id stays its own

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs ``func``."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        name = getattr(func, "__name__", "")
        first = args[0] if args else kwargs.get("input")
        if any(id(a) in self._parameters for a in (*args, *kwargs.values())) and name != "__get__":
            self._last = output
        elif name in _LINKS and isinstance(first, Tensor):
            self._links[id(output)] = output, first
        elif name in _SHAPES and id(first) in self._links:
            self._links[id(output)] = output, self._links[id(first)][1]
        elif func in _LOSSES:
            self._note([first, args[1] if len(args) > 1 else kwargs.get("target")])
        return output

    def _note(self, operands: Sequence[Any]) -> None:
        for operand in operands:
            if isinstance(operand, Tensor) and operand.requires_grad:
                logits = self._links[id(operand)][1] if id(operand) in self._links else operand
                if not any(logits is known for known in self._entered):
                    self._entered.append(logits)

    def outputs(self) -> tuple[Tensor, ...]:
        """Where the network ends: what enters its loss functions, else what its last layer gives."""
        if self._entered and not self._last_layer:
            return tuple(self._entered)
        return () if self._last is None else (self._last,)


def refuse_other_paths(total: Tensor, outputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raises where the loss depends on parameters otherwise than through the outputs.

    Raises:
        ValueError: it does, or there are no outputs; says what works instead.
    """
    way_out = "Use a curvature of the Hessian, such as `ConjugateGradient(matrix='hessian')`, which needs no outputs."
    if not outputs:
        raise ValueError(
            "Expected the network's output in front of a loss function of `torch.nn.functional` or after its last "
            f"layer, for the Gauss-Newton matrix (GGN), found none. {way_out}"
        )
    values = list(parameters.values())
    whole = torch.autograd.grad(total, values, retain_graph=True, allow_unused=True)
    arriving = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
    pairs = [(o, g) for o, g in zip(outputs, arriving, strict=True) if g is not None]
    through = torch.autograd.grad(
        [o for o, _ in pairs], values, [g for _, g in pairs], retain_graph=True, allow_unused=True
    )
    size = max((float(g.abs().max()) for g in whole if g is not None and g.numel()), default=0.0)
    allowed = {torch.float64: 1e-9}.get(outputs[0].dtype, 1e-3) * size
    for name, one, other in zip(parameters, whole, through, strict=True):
        missed = sum(g if s > 0 else -g for g, s in ((one, 1), (other, -1)) if g is not None)
        if isinstance(missed, Tensor) and missed.numel() and float(missed.abs().max()) > allowed:
            raise ValueError(
                "Expected the loss to depend on the parameters through the network's output alone, for the "
                f"Gauss-Newton matrix (GGN), but `{name}` reaches it by another path, such as a "
                "penalty inside the loss. "
                f"{way_out}"
            )
