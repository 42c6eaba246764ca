"""A stand-in accelerator, `standin`, on the CPU's memory and kernels; it refuses what CUDA refuses, and counts.

`load()` builds it with g++ where it has not been built yet, which takes about a minute, and registers it with PyTorch.
From then on the process has two devices, "standin:0" and "standin:1". They do not show races (they are synchronous),
a device's own rounding, or a lack of its memory; they have no fused recurrent cells and no sparse tensors.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lightning_influence.devices import has_float64

NAME = "standin"
DEVICES = 2
HERE = os.environ.get("TESTED_DEVICE", f"{NAME}:0")
"""The device that the tests of this folder compute on; with `TESTED_DEVICE=cuda:0` a real one."""
IS_STANDIN = HERE.startswith(NAME)
OTHER = HERE.split(":")[0] + ":1"

standin_only = pytest.mark.skipif(not IS_STANDIN, reason="of what only the stand-in device has")
FOLDER = "STANDIN_DEVICE_FOLDER"
"""The environment variable that names the folder where the built library is kept."""

_SOURCE = Path(__file__).with_name("standin.cpp")


class CannotBuild(RuntimeError):
    """There is no compiler, or it failed."""


def built():
    """The path of the library, which is built unless it is there."""
    key = hashlib.sha256(_SOURCE.read_bytes() + f"{torch.__version__} {sys.version}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir()) / f"{NAME}-{os.getuid()}")
    library = folder / f"{NAME}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _compile(Path(work) / library.name)
            (Path(work) / library.name).replace(library)
    return library


def _compile(library):
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shutil.which("g++")
    if compiler is None:
        raise CannotBuild("there is no g++")
    options = [
        "-shared",
        "-fPIC",
        "-std=c++20",
        "-O0",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    paths = [f"-I{p}" for p in include_paths()] + [f"-L{p}" for p in library_paths()]
    done = subprocess.run(
        [compiler, *options, *paths, str(_SOURCE), "-o", str(library), "-lc10", "-ltorch_cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotBuild(f"g++ failed:\n{done.stderr[-4000:]}")


@functools.cache
def load():
    """Register the device with PyTorch, once a process.

    Raises:
        CannotBuild: it has not been built, and cannot be.
    """
    torch.ops.load_library(built())
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.ops.standin


def _module():
    """``torch.standin``, with the functions of ``torch.cuda``."""
    module, device_of = types.ModuleType(f"torch.{NAME}"), torch.ops.standin

    def index(device=None):
        found = device if isinstance(device, int) or device is None else torch.device(device).index
        return device_of.device() if found is None else found

    class Device:
        def __init__(self, device):
            self.index = index(device)

        def __enter__(self):
            self.before = index()
            device_of.set_device(self.index)

        def __exit__(self, *error):
            device_of.set_device(self.before)

    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: DEVICES
    module.current_device = index
    module.set_device = lambda device: device_of.set_device(index(device))
    module.device = Device
    module._is_in_bad_fork = lambda: False
    module._lazy_init = lambda: None
    module.synchronize = lambda device=None: torch.accelerator.synchronize()
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.get_rng_state = lambda device=None: device_of.rng_state(index(device))
    module.set_rng_state = lambda state, device=None: device_of.set_rng_state(index(device), state)
    module.get_rng_state_all = lambda: [module.get_rng_state(i) for i in range(DEVICES)]
    module.set_rng_state_all = lambda states: [module.set_rng_state(state, i) for i, state in enumerate(states)]
    module.manual_seed = lambda seed: device_of.seed(index(), seed)
    module.manual_seed_all = lambda seed: [device_of.seed(i, seed) for i in range(DEVICES)]
    return module


@dataclass
class Counts:
    """What happened inside a ``counted()``.

    Args:
        synchronisations: reads of a value (`item`, `bool`), and operations whose result's size depends on values.
        to_host: copies from the device.
        to_device: copies to it.
        operators: operations on the device.
        pinned: those of the copies to the device that the host does not wait for.
    """

    synchronisations: int = 0
    to_host: int = 0
    to_device: int = 0
    operators: int = 0
    pinned: int = 0

    @property
    def pageable(self):
        """Copies to the device before which the host waits for it."""
        return self.to_device - self.pinned

    @property
    def waits(self):
        """How often the host waited for the device's results."""
        return self.synchronisations + self.to_host


@contextlib.contextmanager
def counted():
    """Count what happens on the devices inside; on CUDA waits alone, as PyTorch warns of them."""
    found = Counts()
    if not IS_STANDIN:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.synchronisations = sum("synchronizing CUDA" in str(warning.message) for warning in caught)
        return
    load().reset()
    try:
        yield found
    finally:
        for i, name in enumerate(vars(found)):
            setattr(found, name, torch.ops.standin.count(i))


@contextlib.contextmanager
def without_float64():
    """The devices refuse float64 inside, as Apple's MPS does."""
    load().set_float64(False)
    has_float64.cache_clear()
    try:
        yield
    finally:
        torch.ops.standin.set_float64(True)
        has_float64.cache_clear()
