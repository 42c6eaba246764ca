"""The content of a checkpoint: the state of a fit between two steps, as nested dicts of CPU tensors."""

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_influence.capture.places import CannotRecord
from lightning_influence.capture.randomness import gather_random
from lightning_influence.types import clean


def copied(value: Tensor | float) -> Tensor:
    """A copy on the CPU."""
    if not isinstance(value, Tensor):
        return torch.tensor(value)
    if value.is_meta:
        raise CannotRecord(
            "Expected weights with values, got a tensor on the meta device. Materialise the module before the fit, for"
            " instance in `configure_model`."
        )
    if hasattr(value, "full_tensor"):
        raise CannotRecord("Expected whole weights, got those of one process of several that share them.")
    found = value.detach().to("cpu", copy=True)
    return found.contiguous() if found.layout is torch.strided else found


def gather_state(
    trainer: Any, module: Any, copy: Callable[[Tensor | float], Tensor] = copied, whole: bool = True
) -> dict[str, dict[str, Any]]:
    """Copy weights, buffers, random state and, if ``whole``, optimizer state to the CPU; nothing is changed."""
    return {
        "parameters": {clean(name): copy(p) for name, p in module.named_parameters() if not is_lazy(p)},
        "buffers": {clean(name): copy(b) for name, b in module.named_buffers() if not is_lazy(b)},
        "optimizer": _optimizer_state(trainer, module, copy) if whole else {},
        "random": gather_random(trainer.strategy.root_device),
    }


def encode_state(state: dict[str, dict]) -> memoryview:
    """Serialise a state for `torch.load(weights_only=True)`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def has_lazy(module: Any) -> bool:
    """Whether a parameter or buffer waits for a forward pass that gives it its shape, as those of `LazyLinear` do."""
    return any(is_lazy(tensor) for tensors in (module.parameters(), module.buffers()) for tensor in tensors)


def _optimizer_state(
    trainer: Any, module: Any, copy: Callable[[Tensor | float], Tensor]
) -> dict[str, dict[str, Tensor]]:
    names = {p: clean(name) for name, p in module.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {}
    for optimizer in trainer.optimizers:
        for parameter, values in optimizer.state.items():
            if parameter not in names:
                continue
            # LBFGS keeps lists of tensors, which no method reads
            kept = {key: copy(value) for key, value in values.items() if isinstance(value, (Tensor, int, float))}
            found.setdefault(names[parameter], {}).update(kept)
    return found
