"""The stand-in device is there before any test of this folder: autograd counts the devices at its first pass."""

import pytest
import torch

import devices


@pytest.fixture(scope="session", autouse=True)
def _device():
    if not devices.IS_STANDIN:
        torch.zeros(1, device=devices.HERE)  # a device that has not been used has no random numbers to put back
        return
    try:
        devices.load()
    except devices.CannotBuild as error:
        pytest.skip(f"The stand-in device cannot be built: {error}")


@pytest.fixture(params=["float64", "no float64"])
def dtype(request):
    """The type of weights on a device with float64, and on one without, which a real device only is if it is MPS."""
    if request.param == "float64":
        yield torch.float64
    elif not devices.IS_STANDIN:
        yield torch.float32
    else:
        with devices.without_float64():
            yield torch.float32
