"""How far gradients with the attention kernel of a replay are from those with the kernel of the fit."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_influence.devices import wide

# The kernels that `scaled_dot_product_attention` chooses from.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


class _Fused(TorchDispatchMode):
    """While active, records whether attention runs as one operation; the math kernel is several."""

    ran = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs ``func``."""
        name = func.name()
        self.ran |= "_scaled_dot_product_" in name and "math" not in name
        return func(*args, **(kwargs or {}))


def attention_gap(gradients: Callable[[], Mapping[str, Tensor]]) -> float | None:
    """Distance between gradients with the kernel that torch chooses and with the current one, relative to their length.

    Args:
        gradients: computes the gradients by parameter name.

    Returns:
        None where torch chooses no fused kernel: there is no attention, or torch chooses the math kernel too.
    """
    with sdpa_kernel(_KERNELS), _Fused() as watch:
        fused = gradients()
    if not watch.ran:
        return None
    plain = gradients()
    away = torch.stack([wide(fused[name] - plain[name]).square().sum() for name in plain]).sum().sqrt()
    length = torch.stack([wide(value).square().sum() for value in plain.values()]).sum().sqrt()
    return float(away / length) if length > 0 else float(away)
