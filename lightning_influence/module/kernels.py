"""Layers with kernels of their own, which may lack derivatives or round as a setting of torch says."""

from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

_RECURRENT = ("RNN", "GRU", "LSTM")


class Kernels(NamedTuple):
    """Which of them a module has.

    Args:
        recurrent: recurrent layers of PyTorch, which may be scripted.
        convolutions: transposed ones included.
    """

    recurrent: bool
    convolutions: bool


def kernels_of(module: nn.Module) -> Kernels:
    """Look for them among a module's parts."""
    parts = list(module.modules())
    return Kernels(
        any(isinstance(part, nn.RNNBase) or getattr(part, "original_name", None) in _RECURRENT for part in parts),
        any(isinstance(part, _ConvNd) for part in parts),
    )
