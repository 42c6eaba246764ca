"""The stand-in device refuses what CUDA refuses, has its own random numbers, and counts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import devices

pytestmark = [pytest.mark.device, devices.standin_only]
HERE, OTHER = "standin:0", "standin:1"


def test_tensors_of_two_devices_do_not_mix():
    x = torch.ones(2, 3, device=HERE)
    for wrong in (
        lambda: x + torch.ones(2, 3),
        lambda: x @ torch.ones(3, 3),
        lambda: torch.cat([x, torch.ones(2, 3)]),
        lambda: torch.stack([x.sum(), torch.ones(())]),
        lambda: x + x.to(OTHER),
        lambda: F.conv1d(x[None], torch.ones(1, 2, 1)),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    assert (x * torch.tensor(2.0))[torch.tensor([1])].device == x.device


def test_it_has_its_own_random_numbers():
    before, own = torch.get_rng_state(), torch.standin.get_rng_state()
    first = F.dropout(torch.ones(50, device=HERE))
    torch.standin.set_rng_state(own)
    assert torch.equal(F.dropout(torch.ones(50, device=HERE)).cpu(), first.cpu())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=HERE, generator=torch.Generator())
    assert torch.randn(3, device=HERE, generator=torch.Generator(HERE)).device == torch.device(HERE)


def test_float64_can_be_refused():
    x = torch.ones(2, device=HERE)
    with devices.without_float64():
        for wrong in (x.double, lambda: torch.zeros(2).double().to(HERE), lambda: x.to("cpu", torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        assert (x * 2.0).dtype is torch.float32
    assert x.double().dtype is torch.float64


def test_it_counts_what_a_host_waits_for():
    x = torch.ones(4, device=HERE)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        x.nonzero,
        lambda: x[x > 0],
        torch.accelerator.synchronize,
    ):
        with devices.counted() as counts:
            wait()
        assert counts.synchronisations == 1
    with devices.counted() as counts:
        x.cpu()
        torch.zeros(3).to(HERE)
    assert (counts.synchronisations, counts.to_host, counts.to_device) == (0, 1, 1)


def test_moved_modules_keep_their_parameters_and_ties():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    weight = module[0].weight
    module.to(OTHER)
    assert module[0].weight is module[1].weight is weight
    assert weight.device == torch.device(OTHER)
    with pytest.raises(TypeError, match="numpy"):
        weight.detach().numpy()
