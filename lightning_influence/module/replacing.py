"""Other tensors in the place of a module's parameters and buffers."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from lightning_influence.types import clean


@contextlib.contextmanager
def replacing(
    module: nn.Module, values: dict[str, Tensor], buffers: Mapping[str, Tensor] = MappingProxyType({})
) -> Iterator[None]:
    """Replace every occurrence of the named parameters and buffers by given tensors inside, tied ones included."""
    replacements = {id(p): values[clean(name)] for name, p in module.named_parameters() if clean(name) in values}
    replacements |= {id(b): buffers[clean(name)] for name, b in module.named_buffers() if clean(name) in buffers}
    swapped = []
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for key, tensor in list(tensors.items()):
                if tensor is not None and id(tensor) in replacements:
                    tensors[key] = replacements[id(tensor)]  # type: ignore[assignment]
                    swapped.append((part, tensors, key, tensor))
    owners = {part for part, *_ in swapped}
    _refresh_flat_weights(owners)
    try:
        yield
    finally:
        for _, tensors, key, tensor in swapped:
            tensors[key] = tensor  # type: ignore[assignment]
        _refresh_flat_weights(owners)


def _refresh_flat_weights(parts: Iterable[nn.Module]) -> None:
    """Update the second list of their weights that recurrent modules keep."""
    for part in parts:
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
