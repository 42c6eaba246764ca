"""In which precision a module is computed while it is scored."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_influence.devices import kinds_in_use, roundings
from lightning_influence.module.replacing import replacing
from lightning_influence.module.snapshot import holding, restoring
from lightning_influence.types import Batch, clean

WORDS = ("32-true", "64-true", "bf16-true", "16-mixed", "bf16-mixed")
_LOW = {"bf16-true": torch.bfloat16, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_ALIASES = {32: WORDS[0], 64: WORDS[1], 16: WORDS[3], "bf16": WORDS[4]}
_NO_RANGE = ("16-true", "transformer-engine-float16")
_HALF = (*_NO_RANGE, "bf16-true", "transformer-engine")


@dataclass(frozen=True)
class Precision:
    """In which type weights are held, and in which the module is computed.

    The weights are held in float32 at least: what computes in 16 bits gets copies of them, so that gradients and all
    that is made of them are in float32.

    Args:
        name: Lightning's word; None: the weights' own type without autocast, where float32 stands for 16 bits.
        as_written: leave the module's own autocast on, with None.
        needed: the module runs in no other precision, so that it is checked in this one.
        lowers: the module's weights were of float64 and are held in float32 now, and so must be its inputs.
    """

    name: str | None = None
    as_written: bool = False
    needed: bool = False
    lowers: bool = False

    @property
    def low(self) -> torch.dtype | None:
        """The type of 16 bits in which the module is computed, wholly or by autocast; None: in that of its weights."""
        return None if self.name is None else _LOW.get(self.name)

    @property
    def full(self) -> "Precision":
        """The one in which the module is checked and curvatures are computed: without 16 bits, if it runs so."""
        return self if self.low is None or self.needed else replace(self, name="32-true")

    @property
    def tolerance(self) -> tuple[float, float] | None:
        """Of comparisons of gradients, relative to a parameter's and to the largest entry; None: by their type."""
        return None if self.low is None else (5e-2, 1e-2)

    @property
    def follows_tf32(self) -> bool:
        """Whether products of float32 matrices have as many digits as the user has set for torch."""
        return self.name not in ("32-true", "64-true")

    def held(self, tensor: Tensor) -> torch.dtype:
        """The type in which a tensor of the module is held."""
        if not tensor.is_floating_point():
            return tensor.dtype
        if self.name is None:
            return torch.float32 if is_half(tensor) else tensor.dtype
        return torch.float64 if self.name == "64-true" else torch.float32

    def of_batch(self, batch: Batch, trainer: Any) -> Batch:
        """A batch as the module gets it; with None, a Trainer of float64 converts it."""
        if self._is_that_of(trainer):
            batch = trainer.precision_plugin.convert_input(batch)
        return tree_map(lambda leaf: self._of_input(leaf) if isinstance(leaf, Tensor) else leaf, batch)

    def _of_input(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if self.name in ("64-true", "bf16-true"):  # as Lightning does
            return tensor.to(torch.float64 if self.name == "64-true" else torch.bfloat16)
        if is_half(tensor) or (self.lowers and tensor.dtype is torch.float64):
            return tensor.float()
        return tensor

    @contextlib.contextmanager
    def computing(self, module: nn.Module, device: torch.device, trainer: Any = None) -> Iterator[None]:
        """Run the module in this precision inside; with None, new tensors have the type that the Trainer's have."""
        with contextlib.ExitStack() as stack:
            if self.low is None and not self.as_written:
                stack.enter_context(_no_autocast())
            if self._is_that_of(trainer):
                stack.enter_context(trainer.precision_plugin.forward_context())
            if self.name in ("64-true", "bf16-true"):
                stack.enter_context(default_type(self.low or torch.float64))
            if self.name == "bf16-true":
                stack.enter_context(_cast(module, torch.bfloat16))
            elif self.low is not None:
                # Copies of the weights that autocast keeps would outlive `torch.func`'s tensors.
                stack.enter_context(torch.autocast(device.type, self.low, cache_enabled=False))
            yield

    def _is_that_of(self, trainer: Any) -> bool:
        """Whether the Trainer's decides; one of 16 bits does not, with which scores would lose three digits or more."""
        of_trainer = precision_of(trainer)
        return self.name is None and of_trainer is not None and "mixed" not in of_trainer and of_trainer not in _HALF


def precision_of(trainer: Any) -> str | None:
    """Lightning's word for the precision of a Trainer; None without one."""
    return None if trainer is None else str(getattr(trainer.precision_plugin, "precision", ""))


def check_precision(value: object) -> None:
    """Raises ValueError where ``value`` is not one of the words for a precision, or None."""
    if value is None or (isinstance(value, str) and value in WORDS):
        return
    number = int(value) if isinstance(value, str) and value in ("16", "32", "64") else value
    meant = _ALIASES.get(number) if isinstance(number, (int, str)) and not isinstance(number, bool) else None
    way_out = "Use None for the weights' own precision." if meant is None else f"Write {meant!r}."
    if value in _NO_RANGE:
        way_out = "Small gradients are 0 in float16 alone: use 'bf16-true', or '16-mixed'."
    raise ValueError(
        f"Expected `precision` to be None or one of {', '.join(map(repr, WORDS))}, got {value!r}. {way_out}"
    )


def is_half(tensor: Any) -> bool:
    """Whether this is a tensor of 16-bit floats."""
    return isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """Disable TF32: products of float32 matrices have the digits of float32."""
    with contextlib.ExitStack() as stack:
        try:
            precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        except RuntimeError:  # the user has set it by operation, with which torch does not mix the functions above
            stack.enter_context(restoring(roundings(), "fp32_precision"))
            for setting in roundings():
                setting.fp32_precision = "ieee"
        else:
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", cudnn)
            stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        yield


@contextlib.contextmanager
def outside_autocast() -> Iterator[None]:
    """Leave the regions of ``torch.autocast`` in which the caller is."""
    devices = [device for device in ("cpu", *kinds_in_use()) if torch.is_autocast_enabled(device)]
    for device in devices:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, True)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Keep ``torch.autocast`` off where the module enters it."""
    cls = torch.amp.autocast_mode.autocast
    enter = cls.__enter__

    def off(self: Any) -> Any:
        enabled, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = enabled

    with holding([cls], "__enter__", off):
        yield


@contextlib.contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this type inside, where they are given none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _cast(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Copies of another type in the place of parameters and buffers, whose gradients flow to them."""
    floating = lambda tensors: {clean(n): t.to(dtype) for n, t in tensors if t.dtype.is_floating_point}  # noqa: E731
    named = [own for own in map(vars, module.modules()) if isinstance(own.get("_device"), torch.device)]
    before = [(own, own["_dtype"]) for own in named if isinstance(own.get("_dtype"), torch.dtype)]
    with replacing(module, floating(module.named_parameters()), floating(module.named_buffers())):
        try:
            for own, _ in before:
                own["_dtype"] = dtype  # what a LightningModule's `self.dtype` says
            yield
        finally:
            for own, kind in before:
                own["_dtype"] = kind
