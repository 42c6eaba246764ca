"""Finds the network's outputs, the tensors through which the loss depends on the parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.devices import widest
from lightning_influence.module.torch_functions import Args, Function, FunctionWatch, Kwargs, functions_named, words

# Loss functions that are convex in their first argument, the prediction.
_LOSSES = functions_named(
    "cross_entropy nll_loss mse_loss binary_cross_entropy binary_cross_entropy_with_logits huber_loss smooth_l1_loss "
    "poisson_nll_loss kl_div l1_loss",
    (F,),
)
# Functions between the logits and a loss of probabilities; the network's outputs are then the logits.
_LINKS = words("log_softmax sigmoid logsigmoid log_sigmoid")
_SHAPES = words("squeeze unsqueeze view reshape flatten permute transpose")


class OutputWatch(FunctionWatch):
    """While active, records the inputs of loss functions, and the output of the last operation with a parameter.

    Args:
        parameters: the parameters to look for.
        last_layer: whether to take the last operation's output even if a loss function is called.
    """

    def __init__(self, parameters: Iterable[Tensor], last_layer: bool = False) -> None:
        super().__init__()
        self._parameters = {id(p) for p in parameters}
        self._last_layer = last_layer
        self._loss_inputs: list[Tensor] = []
        self._last: Tensor | None = None
        self._links: dict[int, tuple[Tensor, Tensor]] = {}  # holds the link's output too, so that its id is not reused
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}  # likewise

    def called(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run ``func`` and record it."""
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        name = getattr(func, "__name__", "")
        first = args[0] if args else kwargs.get("input")
        if any(id(a) in self._parameters for a in (*args, *kwargs.values())) and name != "__get__":
            self._last = output
        elif name in _LINKS and isinstance(first, Tensor):
            self._links[id(output)] = output, self._casts.get(id(first), (first, first))[1]
        elif name == "double" and isinstance(first, Tensor):  # of the part of the loss that is computed in float64
            self._casts[id(output)] = output, first
        elif name in _SHAPES and id(first) in self._links:
            self._links[id(output)] = output, self._links[id(first)][1]
        elif func in _LOSSES:
            self._note([first, args[1] if len(args) > 1 else kwargs.get("target")])
        return output

    def _note(self, operands: Sequence[Any]) -> None:
        for operand in operands:
            if isinstance(operand, Tensor) and operand.requires_grad:
                logits = {**self._casts, **self._links}.get(id(operand), (operand, operand))[1]
                if not any(logits is known for known in self._loss_inputs):
                    self._loss_inputs.append(logits)

    def outputs(self) -> tuple[Tensor, ...]:
        """The network's outputs: the inputs of its loss functions, or the output of its last layer if it calls none."""
        if self._loss_inputs and not self._last_layer:
            return tuple(self._loss_inputs)
        return () if self._last is None else (self._last,)


def refuse_other_paths(total: Tensor, outputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise if the loss depends on parameters other than through the outputs.

    Raises:
        ValueError: it does, or no outputs were found; the message says what to use instead.
    """
    way_out = "Use the Hessian, as with `ConjugateGradient(matrix='hessian')`, which needs no outputs."
    if not outputs:
        raise ValueError(
            "Expected, for the Gauss-Newton matrix (GGN), a network output that is passed to a loss function of "
            f"`torch.nn.functional` or comes from a last layer, got none. {way_out}"
        )
    values = list(parameters.values())
    whole = torch.autograd.grad(total, values, retain_graph=True, allow_unused=True)
    arriving = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
    pairs = [(o, g) for o, g in zip(outputs, arriving, strict=True) if g is not None]
    through = torch.autograd.grad(
        [o for o, _ in pairs], values, [g for _, g in pairs], retain_graph=True, allow_unused=True
    )
    missed = {}
    for name, one, other in zip(parameters, whole, through, strict=True):
        found = [g if s > 0 else -g for g, s in ((one, 1), (other, -1)) if g is not None and g.numel()]
        if found:
            missed[name] = widest(torch.stack(found).sum(0).abs().max())
    if not missed:
        return
    size = torch.stack([widest(g.abs().max()) for g in whole if g is not None and g.numel()] or [torch.zeros(())]).max()
    allowed = {torch.float64: 1e-9}.get(outputs[0].dtype, 1e-3) * size
    beyond = (torch.stack([*missed.values()]) > allowed).tolist()
    if name := next((name for name, too_much in zip(missed, beyond, strict=True) if too_much), ""):
        raise ValueError(
            "Expected, for the Gauss-Newton matrix (GGN), a loss that depends on the parameters only through the "
            f"network's output, got `{name}` reaching it by another path, such as a penalty inside the loss. {way_out}"
        )
