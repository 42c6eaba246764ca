"""What differs between devices: whether they have float64, their random generators, waiting for their work."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# ---- float64 --------------------------------------------------------------------------------------------------------


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's MPS does not."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def wide_device(device: torch.device) -> torch.device:
    """The device, or the CPU for one without float64."""
    return device if has_float64(device) else torch.device("cpu")


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float64: where it is, or on the CPU if its device has no float64."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def widest(tensor: Tensor) -> Tensor:
    """A tensor where it is, in float64 if its device has it and in float32 otherwise."""
    return tensor.to(torch.float64 if has_float64(tensor.device) else torch.float32)


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, where float64 becomes float32 if the device has no float64."""
    narrow = tensor.dtype == torch.float64 and not has_float64(device)
    return tensor.to(device, torch.float32 if narrow else tensor.dtype)


def decomposable(matrix: Tensor) -> Tensor:
    """A matrix where its eigenvectors, or a basis, can be computed: MPS has no such operations, nor float64."""
    return matrix if has_float64(matrix.device) else matrix.cpu()


def cumulated(rows: Tensor) -> Tensor:
    """The cumulative sums of each row; some versions of CUDA's are not among torch's deterministic operations."""
    there = rows.cpu() if torch.are_deterministic_algorithms_enabled() else rows
    return there.cumsum(1).to(rows.device)


def has_coarse_products(device: torch.device, convolutions: bool) -> bool:
    """Whether products of float32 matrices are rounded to TF32 (bfloat16 on some CPUs), as the user has set it.

    Args:
        device: where they are computed.
        convolutions: whether those of convolutions and recurrent layers count, for which torch's default is TF32.
    """
    if device.type == "cuda":
        cuda: Any = torch.backends.cuda.matmul
        cudnn: Any = torch.backends.cudnn
        if not hasattr(cuda, "fp32_precision"):  # before PyTorch 2.9
            return torch.get_float32_matmul_precision() != "highest" or (convolutions and cudnn.allow_tf32)
        return cuda.fp32_precision == "tf32" or (convolutions and cudnn.conv.fp32_precision == "tf32")
    amx: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return device.type == "cpu" and getattr(matmul, "fp32_precision", None) == "bf16" and amx()


def roundings() -> list[Any]:
    """Torch's settings by operation of how products in float32 are rounded, each with ``fp32_precision``."""
    cudnn: Any = torch.backends.cudnn
    known = (getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), getattr(torch.backends.mkldnn, "matmul", None))
    return [setting for setting in (torch.backends.cuda.matmul, *known) if hasattr(setting, "fp32_precision")]


# ---- sizes ----------------------------------------------------------------------------------------------------------


def workspace(device: torch.device) -> int:
    """The most elements of one intermediate tensor.

    On a CPU it is small enough to stay in the last-level cache and below the size from which malloc maps fresh pages
    for every allocation (32 MiB), large enough for a full-speed matrix product. Accelerators wait for the host between
    small operations.
    """
    return 2**21 if device.type == "cpu" else 2**25


# ---- reading numbers ------------------------------------------------------------------------------------------------

# Bytes of tensors that are copied together with others, and of such a copy.
_SMALL, _TOGETHER = 2**20, 2**25


class Readings:
    """What devices compute and the host reads together when the first of it is needed: with a single wait."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, list[Tensor]]] = []

    def arriving(self, tensor: Tensor) -> Callable[[], Tensor]:
        """A function that returns a tensor on the CPU, and reads it with all that waits when it is first called."""
        found: list[Tensor] = []
        self._waiting.append((tensor.detach(), found))

        def read() -> Tensor:
            if not found:
                self.read()
            return found[0]

        return read

    def later(self, numbers: Tensor) -> Callable[[], list[float]]:
        """The same for some numbers."""
        read = self.arriving(numbers)
        return lambda: read().flatten().tolist()

    def read(self, tensors: Sequence[Tensor] = ()) -> list[list[float]]:
        """The entries of some tensors, which are read now together with all that waits."""
        waiting = [*self._waiting]
        arrived = on_host([*tensors, *(tensor for tensor, _ in waiting)])
        del self._waiting[: len(waiting)]  # not where memory ran out
        for (_, found), tensor in zip(waiting, arrived[len(tensors) :], strict=True):
            found.append(tensor)
        return [tensor.flatten().tolist() for tensor in arrived[: len(tensors)]]


def read_numbers(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The entries of some tensors, with a single wait for each of their devices."""
    return [tensor.flatten().tolist() for tensor in on_host(tensors)]


def read_ends(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The smallest and the largest entry of each tensor, likewise; twice 0 of one without entries."""
    return read_numbers([torch.stack(torch.aminmax(t)) if t.numel() else t.new_zeros(2) for t in tensors])


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the CPU, as they are; small ones come from their device in one copy, with a single wait."""
    return list(on_device(tensors, torch.device("cpu")))


def on_device(tensors: Sequence[Tensor], target: torch.device) -> Iterator[Tensor]:
    """Tensors on a device, as they are; small ones arrive in one copy, for which the host waits only on the CPU.

    Large ones are copied when it is their turn, so that those before may already have taken the places of others.
    """
    found = [tensor.detach() for tensor in tensors]
    for device in {tensor.device for tensor in found if tensor.device != target}:
        small = [i for i, tensor in enumerate(found) if tensor.device == device and _is_small(tensor)]
        small.sort(key=lambda i: -found[i].itemsize)  # each begins at a multiple of its own size
        ends = itertools.accumulate(found[i].nbytes for i in small)
        for _, pairs in itertools.groupby(zip(small, ends, strict=True), lambda pair: pair[1] // _TOGETHER):
            places = [i for i, _ in pairs]
            sizes = [found[i].nbytes for i in places]
            joined = torch.cat([found[i].reshape(-1).contiguous().view(torch.uint8) for i in places])
            joined = pinned(joined, target).to(target, non_blocking=has_pinned_memory(target))
            for i, bits in zip(places, joined.split(sizes), strict=True):
                own = bits.view(found[i].dtype).reshape(found[i].shape)
                found[i] = torch.empty_like(found[i], device=target).copy_(own)  # in the same order of memory
    yield from (tensor.to(target) for tensor in found)


def _is_small(tensor: Tensor) -> bool:
    """Whether it may be copied together with others."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided
    return plain and not tensor.is_complex() and not tensor.is_neg() and tensor.nbytes <= _SMALL


# ---- copies to a device ---------------------------------------------------------------------------------------------


@cache
def has_pinned_memory(device: torch.device) -> bool:
    """Whether the host has memory that a device copies from without being waited for."""
    if device.type in ("cpu", "mps"):  # Lightning waits for copies to MPS, which may be wrong otherwise
        return False
    try:
        return torch.empty(1).pin_memory().is_pinned()
    except (RuntimeError, NotImplementedError):
        return False


def pinned(leaf: Any, device: torch.device) -> Any:
    """A tensor of a batch, in memory from which a device copies while the host goes on; anything else as it is."""
    plain = isinstance(leaf, Tensor) and type(leaf) is Tensor and leaf.is_cpu and leaf.layout is torch.strided
    if not plain or leaf.requires_grad or not has_pinned_memory(device):
        return leaf
    return leaf.pin_memory()


# ---- accelerators ---------------------------------------------------------------------------------------------------


def kinds_in_use() -> Iterator[str]:
    """The types of the accelerators that this process has used, or may have; it initialises none."""
    for kind in ("cuda", "mps", "xpu", "hpu", torch._C._get_privateuse1_backend_name()):
        module = getattr(torch, kind, None)
        if kind == "mps":
            used = torch.backends.mps.is_available()
        else:
            used = getattr(module, "is_initialized", lambda: False)()
        if used:
            yield kind


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one of its kind inside, as Lightning does in a fit."""
    of_kind = (
        None if device.index is None or device.type in ("cpu", "mps") else getattr(_module(device), "device", None)
    )
    return contextlib.nullcontext() if of_kind is None else of_kind(device)


def synchronize() -> None:
    """Wait until the current accelerators have done what they were given."""
    for kind in kinds_in_use():
        getattr(torch, kind).synchronize()


def rng_states() -> dict[torch.device, Tensor]:
    """The state of every accelerator's random generator."""
    found = {}
    for kind in kinds_in_use():
        for index in range(getattr(torch, kind).device_count()):
            device = torch.device(kind, index)
            found[device] = rng_state(device)
    return {device: state for device, state in found.items() if state is not None}


def rng_state(device: torch.device) -> Tensor | None:
    """The state of an accelerator's random generator; None for the CPU, and where it shows none."""
    read = None if device.type == "cpu" else getattr(_module(device), "get_rng_state", None)
    return None if read is None else read(device)


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Put back the state of an accelerator's random generator."""
    _module(device).set_rng_state(state, device)


def seed_accelerators(seed: int) -> None:
    """Seed the random generators of the accelerators."""
    for kind in kinds_in_use():
        of_kind: Any = getattr(torch, kind)
        getattr(of_kind, "manual_seed_all", of_kind.manual_seed)(seed)


def _module(device: torch.device) -> Any:
    """``torch.cuda`` and its like."""
    return getattr(torch, device.type, None)
