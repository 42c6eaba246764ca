"""Whether a pass reads the mode of modules (``self.training``): if not, it is the same in training and in eval mode."""

import contextlib
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd


def has_known_modes(part: nn.Module) -> bool:
    """Whether a layer's modes differ in known ways: dropout, normalisation, and all layers of torch."""
    return type(part).__module__.partition(".")[0] == "torch" or isinstance(part, (_NormBase, _DropoutNd))


class ModeReads(contextlib.AbstractContextManager["ModeReads"]):
    """Notes inside whether the mode of one of the user's modules is read.

    Args:
        module: with its submodules.
    """

    def __init__(self, module: nn.Module) -> None:
        self.read = False
        """Whether it was, or may have been unseen."""
        parts = list(module.modules())
        self._kinds = {type(part) for part in parts if not has_known_modes(part)}
        # compiled code reads attributes without asking the class
        if any(type(part).__module__.startswith(("torch._dynamo", "torch.jit")) for part in parts) or any(
            getattr(part, "_compiled_call_impl", None) is not None for part in parts
        ):
            self.read = True
        if any(hasattr(kind, "training") for kind in self._kinds):
            self.read, self._kinds = True, set()

    def __enter__(self) -> "ModeReads":
        def get(part: nn.Module) -> Any:
            self.read = True
            return part.__dict__["training"]

        def put(part: nn.Module, value: Any) -> None:
            part.__dict__["training"] = value

        for kind in self._kinds:
            kind.training = property(get, put)  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        for kind in self._kinds:
            del kind.training
