"""Layers with kernels of their own, which may lack derivatives or round as a setting of torch says."""

from torch import nn
from torch.nn.modules.conv import _ConvNd


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module has recurrent layers of PyTorch, which may be scripted."""
    kinds = ("RNN", "GRU", "LSTM")
    return any(
        isinstance(part, nn.RNNBase) or getattr(part, "original_name", None) in kinds for part in module.modules()
    )


def has_convolutions(module: nn.Module) -> bool:
    """Whether it has convolutions, transposed ones included."""
    return any(isinstance(part, _ConvNd) for part in module.modules())
