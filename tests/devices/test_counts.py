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


# Waits for the device and copies to it: (of the first question about 10 blocks, of a further block in later questions).
CEILINGS = {
    "GradientDot": (GradientDot(), 430, 1.5),
    "EKFAC": (InfluenceFunction(EKFAC()), 600, 3.0),
    "LiSSA": (InfluenceFunction(LiSSA(damping=0.5)), 700, 6.0),
    "Arnoldi": (InfluenceFunction(Arnoldi(damping=0.1, steps=10)), 700, 6.0),
}


@pytest.mark.parametrize("name", CEILINGS)
def test_the_host_seldom_waits(name):
    method, first, each = CEILINGS[name]
    some, more = (counts_of(method, n * BLOCK) for n in (10, 30))
    print(name, some, more, (more[1].waits - some[1].waits) / 20, (more[1].to_device - some[1].to_device) / 20)
    assert some[0].waits <= first
    assert more[1].waits - some[1].waits <= 20 * each


def test_scores_leave_the_device_once_a_tile():
    some, more = (counts_of(GradientDot(), n * BLOCK)[1] for n in (10, 30))
    checks = 20 + 2 * 10
    assert more.to_host - some.to_host <= checks
