"""Tensors inside ``torch.func`` transforms, such as ``vmap`` and ``grad``, that a training step calls."""

from torch import Tensor
from torch._C import _functorch


def in_transform() -> bool:
    """Whether a transform is active: tensors made inside it mean nothing after it."""
    return _functorch.peek_interpreter_stack() is not None


def without_transforms(tensor: Tensor) -> Tensor | None:
    """The plain tensor that stands behind one inside transforms; None where ``vmap`` hides a dimension of it."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return None
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
