"""Layers that a module does not have yet when it is made: of ``configure_model`` and of lazy layers."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_influence.module.data_hooks import overrides
from lightning_influence.module.random_state import isolated_random_state
from lightning_influence.module.trainer_state import detached_trainer
from lightning_influence.types import clean

# What lazy layers of torch take from their first input, and the dimension of their weight that has it.
_SIZES = {"in_features": 1, "in_channels": 1, "num_features": 0}


def make_layers(module: Any, saved: Callable[[], Mapping[str, Tensor]] | None) -> None:
    """Make the layers that a fit had and a new module does not have, as Lightning or the first batch would.

    Args:
        module: the LightningModule.
        saved: reads parameters and buffers of a checkpoint; None: there is none.

    Raises:
        ValueError: a lazy layer without a checkpoint that has its shape; `configure_model` fails.
    """
    configures = overrides(module, "configure_model")
    if not configures and not _lazy(module):
        return
    state = {} if saved is None else saved()
    if configures and state.keys() - {clean(name) for name in (*module.state_dict(), *_names(module))}:
        _configure(module)
    for name, tensor in _lazy(module).items():
        if name not in state:
            raise ValueError(
                f"Expected parameters with shapes, got `{name}` of a lazy layer that has seen no batch. Pass a batch "
                f"through the module first (`{type(module).__name__}(...)(x)`), or a `trajectory=` of its fit."
            )
        tensor.materialize(state[name].shape)
        tensor.data.copy_(state[name])
    for layer in module.modules():
        if isinstance(layer, LazyModuleMixin) and not layer.has_uninitialized_params():  # type: ignore[misc]
            _finish(layer)


def sharded_parts(module: nn.Module) -> list[Any]:
    """The submodules whose weights several processes share by ``fully_shard``."""
    return [part for part in module.modules() if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__)]


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def _configure(module: Any) -> None:
    own = module._trainer
    with isolated_random_state():
        try:
            if own is None:
                module._trainer = detached_trainer(module)
            module.configure_model()
        except Exception as error:
            raise ValueError(
                f"Expected a module with its layers, got an error when they were to be made: `configure_model` raised "
                f"{type(error).__name__}: {error}. Call it before the module is passed, or let it shard weights"
                " only where there is a `self.device_mesh`."
            ) from error
        finally:
            module._trainer = own


def _lazy(module: nn.Module) -> dict[str, Any]:
    return {clean(n): t for n, t in (*module.named_parameters(), *module.named_buffers()) if is_lazy(t)}


def _finish(layer: Any) -> None:
    """Make a lazy layer what its first batch would have made of it."""
    for name, dimension in _SIZES.items():
        weight = getattr(layer, "weight", None)
        if getattr(layer, name, None) == 0 and isinstance(weight, Tensor):
            groups = getattr(layer, "groups", 1)
            transposed = getattr(layer, "transposed", False)
            setattr(layer, name, weight.shape[0] if transposed else weight.shape[dimension] * groups)
        elif getattr(layer, name, None) == 0 and isinstance(getattr(layer, "running_mean", None), Tensor):
            setattr(layer, name, len(layer.running_mean))
    for name in ("_initialize_hook", "_load_hook"):
        hook = layer.__dict__.pop(name, None)
        if hook is not None:
            hook.remove()
    if layer.cls_to_become is not None:
        layer.__class__ = layer.cls_to_become
