"""``training_step`` as a function, whether it takes and reads the index of its batch, and the loss that it returns."""

import dis
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_influence.types import is_own

# Ways to read a variable other than by its name.
_INDIRECT = frozenset({"locals", "vars", "eval", "exec", "currentframe", "_getframe", "stack"})


class NoLoss(TypeError):
    """``training_step`` returned None, with which Lightning skips the batch."""


def step_of(module: nn.Module) -> Callable[..., Any]:
    """``training_step`` as the user wrote it."""
    context = getattr(module, "_compiler_ctx", None)  # `torch.compile(module)` replaced the step by a compiled one
    step = context["original_training_step"] if context else getattr(module, "training_step", None)
    if step is None:
        raise TypeError(
            f"Expected a LightningModule with a `training_step`, got {type(module).__name__}. Pass `loss=`, a callable "
            "(module, batch) -> [batch] of per-sample losses."
        )
    if getattr(module, "automatic_optimization", True) is False:
        raise ValueError(
            "Expected a `training_step` that returns its loss, got manual optimization in "
            f"{type(module).__name__}, whose step updates the weights itself. Pass `loss=`, a callable (module, batch) "
            "-> [batch] of per-sample losses."
        )
    found: Callable[..., Any] = step
    return found


def takes_index(step: Callable[..., Any]) -> bool:
    """Whether the step has a second argument of any name: Lightning passes the batch's index by position."""
    parameters = inspect.signature(step).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def reads_index(step: Callable[..., Any]) -> bool:
    """Whether the code of a step that takes the index reads it at all; True where that cannot be seen."""
    code = getattr(getattr(step, "__func__", step), "__code__", None)
    position = 2 if inspect.ismethod(step) else 1
    if code is None or code.co_argcount <= position:
        return True
    name = code.co_varnames[position]
    if name in code.co_cellvars or not _INDIRECT.isdisjoint(code.co_names):
        return True
    for instruction in dis.get_instructions(code):
        operands = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        if name in operands and instruction.opname not in ("STORE_FAST", "DELETE_FAST"):
            return True
    return False


def set_by_hook(module: nn.Module) -> list[str]:
    """Attributes that the module's ``on_train_batch_start`` sets, given the batch's index, and its other code reads."""
    hook = getattr(module, "on_train_batch_start", None)
    code = getattr(getattr(hook, "__func__", None), "__code__", None)
    if hook is None or code is None or not is_own(hook) or not reads_index(hook):
        return []
    stored = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}
    names = [name for name in dir(type(module)) if name != "on_train_batch_start"]
    others = [function for name in names if inspect.isfunction(function := inspect.getattr_static(module, name))]
    read = {name for function in others if is_own(function) for name in function.__code__.co_names}
    return sorted(stored & read)


def loss_in(output: Any, per_sample: bool) -> Tensor:
    """The loss that a step has returned: a scalar, or [batch] of a ``loss=``.

    Args:
        output: what it returned; of a dict, its ``"loss"``.
        per_sample: whether it is a ``loss=``.

    Raises:
        NoLoss: there is none.
        TypeError: it is not a tensor.
        ValueError: it has another shape.
    """
    if not isinstance(output, Tensor):
        source = "`loss=`" if per_sample else "`training_step`"
        raise (NoLoss if output is None else TypeError)(
            f"Expected {source} to return a tensor (or a dict with 'loss'), got {type(output).__name__}. "
            "Pass `loss=`, a callable (module, batch) -> [batch] of per-sample losses."
        )
    if not per_sample and output.numel() != 1:
        raise ValueError(
            f"Expected `training_step` to return a scalar loss, got shape {tuple(output.shape)}. "
            "Pass `loss=`, a callable (module, batch) -> [batch] of per-sample losses."
        )
    if per_sample and output.ndim != 1:
        raise ValueError(
            f"Expected `loss=` to return per-sample losses [batch], got shape {tuple(output.shape)}. Do not reduce "
            "over the batch inside it."
        )
    return output
