"""Ceilings on how often the host waits for a device, and on copies to it."""

import pytest
import torch

import devices
from devices.fits_on import Net, data, trainer
from lightning_influence import EKFAC, Arnoldi, Attributor, GradientDot, InfluenceFunction, LiSSA

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore")]
BLOCK = 8


def counts_of(method, n):
    """Of a first question about ``n`` training examples, and of a second one."""
    torch.manual_seed(0)
    ask = Attributor(Net(), data(n, 1, torch.float32), trainer=trainer("standin:0"), batch_size=BLOCK)
    found = []
    for _ in range(2):
        with devices.counted() as counts:
            ask.score(method, data(BLOCK, 2, torch.float32))
        found.append(counts)
    return found


# Waits for the device of each further block in later questions.
CEILINGS = {
    "GradientDot": (GradientDot(), 1.2),
    "EKFAC": (InfluenceFunction(EKFAC()), 4.8),
    "LiSSA": (InfluenceFunction(LiSSA(damping=0.5)), 2.0),
    "Arnoldi": (InfluenceFunction(Arnoldi(damping=0.1, steps=10)), 1.2),
}
# Waits of the checks in a first question, beyond those of a later one.
CHECKS = 20


@pytest.mark.parametrize("name", CEILINGS)
def test_the_host_seldom_waits(name):
    method, each = CEILINGS[name]
    some, more = (counts_of(method, n * BLOCK) for n in (10, 30))
    assert some[0].waits - some[1].waits <= CHECKS
    assert more[1].waits - some[1].waits <= 20 * each


def test_a_block_is_copied_to_the_device_once():
    some, more = (counts_of(GradientDot(), n * BLOCK)[1] for n in (10, 30))
    assert more.to_device - some.to_device <= 20 * 2.2  # inputs and labels; now and then an example for a spot check
