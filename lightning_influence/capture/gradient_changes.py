"""What may change gradients between the loss and the optimizer's step: overridden hooks, and hooks on parameters."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_influence.module.data_hooks import overrides
from lightning_influence.types import LIBRARIES, clean

# `configure_gradient_clipping` has a note of its own.
_OF_MODULE = (
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
    "on_before_zero_grad",
    "optimizer_zero_grad",
)
_OF_CALLBACK = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
_OF_PLUGIN = ("backward", "pre_backward", "post_backward", "optimizer_step", "clip_gradients")
_HOOKS_ON_TENSOR = ("_backward_hooks", "_post_accumulate_grad_hooks")
_HOOKS_ON_MODULE = ("_backward_hooks", "_backward_pre_hooks")
# Hooks of these only read gradients, as `wandb.watch` does.
_READERS = LIBRARIES | {"wandb"}
_SHOWN = 6
CLIPPED_OTHERWISE = (
    "Gradients were clipped by value or by the module's own `configure_gradient_clipping`, which no single coefficient"
    " describes, or as shards by an optimizer that may change them in its step (others than SGD without Nesterov's"
    " momentum, Adam and AdamW); exposure treats them as not clipped."
)


def has_own_step(optimizer: Optimizer) -> bool:
    """Whether an optimizer's ``step`` is none of torch's, so that its options do not say how far it goes."""
    step = getattr(type(optimizer), "step", None)  # torch wraps it, in the class, under its own name
    return str(getattr(step, "__module__", "")).partition(".")[0] != "torch"


def gradient_changes(trainer: Any, module: Any) -> list[str]:
    """Names of what may change gradients between the loss and the step; nothing is called.

    Args:
        trainer: of the fit.
        module: the LightningModule.
    """
    owners = [(module, (*_OF_MODULE, *(() if module.automatic_optimization else ("training_step", "manual_backward"))))]
    owners += [(callback, _OF_CALLBACK) for callback in trainer.callbacks]
    owners += [(part, _OF_PLUGIN) for part in (trainer.strategy, trainer.precision_plugin)]
    found = [f"`{type(owner).__name__}.{hook}`" for owner, hooks in owners for hook in hooks if overrides(owner, hook)]
    for name, parameter in module.named_parameters():
        if any(_are_users(getattr(parameter, hooks, None)) for hooks in _HOOKS_ON_TENSOR):
            found.append(f"a hook on `{clean(name)}`")
    for name, part in module.named_modules():
        if any(_are_users(getattr(part, hooks, None)) for hooks in _HOOKS_ON_MODULE):
            found.append(f"a backward hook on `{clean(name) or type(part).__name__}`")
    for optimizer in trainer.optimizers:
        kind = type(optimizer).__name__
        if _are_users(getattr(optimizer, "_optimizer_step_pre_hooks", None)):
            found.append(f"a hook before `{kind}.step`")
        if has_own_step(optimizer):
            found.append(f"`{kind}.step`")
    return list(dict.fromkeys(found))


class GradientChanges:
    """What may change gradients in one fit, as a note, which is written anew when hooks were added.

    Args:
        trainer: of the fit.
        module: the LightningModule.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self._trainer, self._module = trainer, module
        self._text = ""

    def note(self, notes: list[str]) -> None:
        """Add the note to those of a run, once."""
        found = gradient_changes(self._trainer, self._module)
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        text = (
            f"Between the loss and the optimizer's step, the fit ran {', '.join(found[:_SHOWN])}{more}. If that "
            "scales the loss, or changes gradients or the step, this is not in the scores, which are of the loss's own "
            "gradients and the recorded learning rates."
        )
        if found and text != self._text:
            notes[:] = [note for note in notes if note != self._text] + [text]
            self._text = text


def _are_users(hooks: Mapping[int, Any] | None) -> bool:
    return any(_package_of(hook) not in _READERS for hook in (hooks or {}).values())


def _package_of(function: Any) -> str:
    function = getattr(function, "func", function)  # of a partial
    name = getattr(function, "__module__", None) or type(function).__module__
    return str(name).partition(".")[0]
